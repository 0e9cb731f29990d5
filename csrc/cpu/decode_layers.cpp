// Rows do not need each other: where there are many, each thread takes its rows through all layers, without waiting for
// the others, and what it computes stays near it. While one thread's attention waits for memory, another multiplies.
#include "cpu/decode_layers.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/aligned_floats.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"

namespace xrl::XRL_ISA {
namespace {

// Threads on their own each read all weights: with so many rows they compute for longer than they read.
constexpr int64_t kRowsPerThread = 64;

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

void run_layers(const DecoderLayer* layers, int64_t num_layers, const DecoderShape& shape, const DecoderRows& rows,
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
  for (const DecoderLayer* layer = layers; layer < layers + num_layers; ++layer) {
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

void decode_layers(const DecoderLayer* layers, int64_t num_layers, const DecoderShape& shape, const DecoderRows& rows,
                   float* x, int num_threads) {
  if (rows.count < kRowsPerThread * num_threads) {
    return run_layers(layers, num_layers, shape, rows, x, num_threads);
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = rows.count * thread / team, last = rows.count * (thread + 1) / team;
    run_layers(layers, num_layers, shape, RowRange(rows, first, last).rows(), x + first * shape.hidden, 1);
  }
}

}  // namespace xrl::XRL_ISA
