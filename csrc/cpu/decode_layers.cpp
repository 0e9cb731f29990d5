// Rows do not need each other: where there are many, each thread takes its rows through all layers, without waiting for
// the others, and what it computes stays near it. While one thread's attention waits for memory, another may multiply.
#include "cpu/decode_layers.h"

#include <algorithm>
#include <vector>

#include "cpu/aligned_floats.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

// Each piece of the rows reads all weights: with so many rows it computes for longer than it reads.
constexpr int64_t kRowsPerPiece = 64;
constexpr int64_t kMostPieces = 4;  // of a thread's rows: what a late thread has left, another takes

// Rows [first, last) of a batch, with those of its groups that they belong to.
class RowRange {
 public:
  RowRange(const DecoderRows& all, int64_t first, int64_t last) : rows_(all) {
    PagedRows& context = rows_.context;
    int group = 0;
    while (context.group_starts[group + 1] <= first) ++group;
    const int first_group = group;
    for (; context.group_starts[group] < last; ++group) {
      starts_.push_back(static_cast<int32_t>(std::max<int64_t>(context.group_starts[group] - first, 0)));
    }
    starts_.push_back(static_cast<int32_t>(last - first));
    context.group_starts = starts_.data();
    context.num_groups = group - first_group;
    context.prompt_blocks += first_group * context.prompt_blocks_stride;
    context.prompt_lengths += first_group;
    context.row_blocks += first * context.row_blocks_stride;
    context.row_lengths += first;
    rows_.count = last - first;
    rows_.positions += first;
    rows_.slots += first;
  }

  RowRange(const RowRange&) = delete;

  const DecoderRows& rows() const { return rows_; }

 private:
  DecoderRows rows_;
  std::vector<int32_t> starts_;
};

// The borders of `num_parts` consecutive ranges of rows that take about as long as each other. A product takes a time
// for each weight, attention one for each number of the context, which comes from memory.
std::vector<int64_t> equal_parts(const DecoderShape& shape, const DecoderRows& rows, int64_t num_parts) {
  constexpr int64_t kWeightsPerNumber = 20;  // that are multiplied while a number is fetched
  const int64_t heads = shape.num_heads + 2 * shape.num_kv_heads + shape.num_heads;
  const int64_t num_weights = shape.hidden * (heads * shape.head_dim + 3 * shape.ffn);
  const int64_t numbers_per_token = 2 * static_cast<int64_t>(shape.num_kv_heads) * shape.head_dim;
  std::vector<int64_t> cost_before(rows.count + 1, 0);
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t numbers = rows.context.row_lengths[row] * numbers_per_token;
    cost_before[row + 1] = cost_before[row] + num_weights + kWeightsPerNumber * numbers;
  }
  std::vector<int64_t> borders;
  for (int64_t part = 0; part <= num_parts; ++part) {
    const int64_t target = cost_before.back() / num_parts * part;
    borders.push_back(std::lower_bound(cost_before.begin(), cost_before.end(), target) - cost_before.begin());
  }
  borders.back() = rows.count;
  return borders;
}

void run_layers(const DecodeLayer* layers, int64_t num_layers, const DecoderShape& shape, const DecoderRows& rows,
                float* x, int num_threads) {
  const int64_t count = rows.count, hidden = shape.hidden, ffn = shape.ffn;
  const int64_t query_width = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
  const int64_t qkv_width = query_width + 2 * static_cast<int64_t>(shape.num_kv_heads) * shape.head_dim;
  const Floats normed = make_floats(count * hidden), between = make_floats(count * hidden);
  const Floats qkv = make_floats(count * qkv_width), attended = make_floats(count * query_width);
  const Floats activated = make_floats(count * ffn);
  const auto multiply = [&](const float* a, const PackedWeight& weight, const Addend& addend, float* out) {
    packed_matmul({a, weight.depth, 1}, weight, addend, count, out, weight.columns, num_threads);
  };
  for (const DecodeLayer* layer = layers; layer < layers + num_layers; ++layer) {
    rms_norm<float>(x, layer->input_norm, shape.eps, count, hidden, normed.get(), num_threads);
    multiply(normed.get(), {layer->qkv, hidden, qkv_width, false}, {layer->qkv_bias, 0}, qkv.get());
    rope_cache<float>({qkv.get(), count, shape.num_heads, shape.num_kv_heads, shape.head_dim, rows.positions,
                       rows.slots, layer->keys, layer->values, shape.block_size},
                      {rows.cos, rows.sin, layer->q_norm, layer->k_norm, shape.eps}, num_threads);
    decode_attention<float>({qkv.get(), attended.get(), shape.num_heads, qkv_width},
                            {layer->keys, layer->values, shape.num_kv_heads, shape.block_size, shape.head_dim},
                            rows.context, num_threads);
    multiply(attended.get(), {layer->attention_out, query_width, hidden, false}, {x, hidden}, between.get());
    rms_norm<float>(between.get(), layer->mlp_norm, shape.eps, count, hidden, normed.get(), num_threads);
    multiply(normed.get(), {layer->gate_up, hidden, ffn, true}, {nullptr, 0}, activated.get());
    multiply(activated.get(), {layer->down, ffn, hidden, false}, {between.get(), hidden}, x);
  }
}

}  // namespace

void decode_layers(const DecodeLayer* layers, int64_t num_layers, const DecoderShape& shape, const DecoderRows& rows,
                   float* x, int num_threads) {
  if (rows.count < kRowsPerPiece * num_threads) {
    return run_layers(layers, num_layers, shape, rows, x, num_threads);
  }
  const int64_t num_pieces = std::min<int64_t>(rows.count / (kRowsPerPiece * num_threads), kMostPieces);
  const std::vector<int64_t> borders = equal_parts(shape, rows, num_pieces * num_threads);
  Shares shares(num_threads);
  run_on_team(num_threads, [&](int thread) {
    int owner;
    for (int64_t piece; shares.take(thread, [&](int) { return num_pieces; }, owner, piece);) {
      const int64_t first = borders[owner * num_pieces + piece], last = borders[owner * num_pieces + piece + 1];
      if (first == last) continue;
      run_layers(layers, num_layers, shape, RowRange(rows, first, last).rows(), x + first * shape.hidden, 1);
    }
  });
}

}  // namespace xrl::XRL_ISA
