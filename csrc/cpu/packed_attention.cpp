// One task is one sequence and one KV head. The keys a sequence sees are its prompt's and then its own, side by side:
// query i of it sees the first prompt_length + i + 1 of them. Softmax as in FlashAttention-2 (arXiv:2307.08691): scores
// are never held whole, and the backward pass computes them again.
#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/aligned_floats.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

constexpr int kTileQueries = 11 * kProductRows;  // queries scored together: about as many as keys
constexpr int kTileKeys = 64;                    // columns of a transposed tile of keys, which then fits in L1
constexpr int kSpanKeys = 4 * kTileKeys;         // scored before the softmax is brought up to date
constexpr float kLowest = -std::numeric_limits<float>::infinity();

static_assert(kTileKeys % kLanes == 0);

// A sequence with the prompt it continues.
struct Context {
  int64_t start;
  int length;
  int64_t prompt_start;
  int prompt_length;

  Context(const PackedSequences& sequences, int64_t sequence)
      : start(sequences.starts[sequence]), length(sequences.lengths[sequence]), prompt_start(0), prompt_length(0) {
    const int32_t parent = sequences.parents[sequence];
    if (parent < 0) return;
    prompt_start = sequences.starts[parent];
    prompt_length = sequences.lengths[parent];
  }

  int num_keys() const { return prompt_length + length; }

  int64_t key_token(int key, int64_t step) const {
    return key < prompt_length ? prompt_start + key * step : start + (key - prompt_length) * step;
  }
};

int64_t most_keys(const PackedSequences& sequences) {
  int64_t most = 0;
  for (int64_t s = 0; s < sequences.count; ++s) most = std::max<int64_t>(most, Context(sequences, s).num_keys());
  return round_up(most, kTileKeys);
}

template <typename T>
inline const T* head_of(const TokenHeads<const T>& heads, int64_t token, int head) {
  return heads.data + token * heads.token_stride + head * heads.head_stride;
}

template <typename T>
inline T* head_of(const TokenHeads<T>& heads, int64_t token, int head) {
  return heads.data + token * heads.token_stride + head * heads.head_stride;
}

// rows[i][:] = factor * head `head` of token start + i * step.
template <typename T>
inline void gather(const TokenHeads<const T>& heads, int head, int64_t start, int64_t step, int count, int dim,
                   float factor, float* rows) {
  for (int i = 0; i < count; ++i) {
    const T* place = head_of(heads, start + i * step, head);
    for (int d = 0; d < dim; d += kLanes) store_lanes(rows + i * dim + d, load_lanes(place + d) * factor);
  }
}

// Keys or values of a context one below the other: rows[num_keys][dim].
template <typename T>
void gather_context(const TokenHeads<const T>& heads, int head, const Context& context, int64_t step, int dim,
                    float* rows) {
  gather(heads, head, context.prompt_start, step, context.prompt_length, dim, 1.0f, rows);
  gather(heads, head, context.start, step, context.length, dim, 1.0f, rows + context.prompt_length * dim);
}

// The same transposed, tile by tile of kTileKeys keys: tiles[key / kTileKeys][d][key % kTileKeys].
template <typename T>
void gather_transposed(const TokenHeads<const T>& heads, int head, const Context& context, int64_t step, int dim,
                       float* tiles) {
  const int num_keys = context.num_keys();
  for (int first = 0; first < num_keys; first += kTileKeys, tiles += dim * kTileKeys) {
    for (int j = 0; j < kTileKeys; j += kLanes) {
      for (int d = 0; d < dim; d += kLanes) {
        Lanes square[kLanes];
        for (int key = 0; key < kLanes; ++key) {
          const int number = first + j + key;
          square[key] = number < num_keys ? load_lanes(head_of(heads, context.key_token(number, step), head) + d)
                                          : Lanes{};
        }
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store_lanes(tiles + (d + i) * kTileKeys + j, square[i]);
      }
    }
  }
}

// Which of some neighbouring keys some neighbouring queries see: each query one more than the query before it.
struct CausalEdge {
  int seen_by_first;  // may be less than none, or more than all
  int num_queries;
  int num_keys;

  int seen(int query) const { return std::clamp(seen_by_first + query, 0, num_keys); }
  int rows(int query) const { return std::min(kProductRows, num_queries - query); }
  // By any of the kProductRows queries that begin with this one.
  int seen_by_group(int query) const { return seen(query + rows(query) - 1); }
  // The first query that sees this key.
  int first_query(int key) const { return std::clamp(key + 1 - seen_by_first, 0, num_queries); }
};

// scores[query][key] = query . key, of the keys that the group of the query sees.
inline void scores_product(const float* queries, const float* key_tile, const CausalEdge& edge, int dim, float* scores,
                           int64_t stride) {
  for (int i = 0; i < edge.num_queries; i += kProductRows) {
    product({queries + i * dim, dim, 1}, key_tile, kTileKeys, edge.rows(i), edge.seen_by_group(i), dim,
            scores + i * stride, stride, false);
  }
}

// out[query] (+)= the sum over keys of weights[query][key] * values[key]
inline void weighted_sums(const float* weights, int64_t stride, const float* values, const CausalEdge& edge, int dim,
                          float* out, bool adds) {
  for (int i = 0; i < edge.num_queries; i += kProductRows) {
    product({weights + i * stride, stride, 1}, values, dim, edge.rows(i), dim, edge.seen_by_group(i), out + i * dim,
            dim, adds);
  }
}

// out[key] += the sum over queries of weights[query][key] * rows[query]
inline void add_transposed_sums(const float* weights, int64_t stride, const float* rows, const CausalEdge& edge,
                                int dim, float* out) {
  for (int key = 0; key < edge.num_keys; key += kProductRows) {
    const int first = edge.first_query(key);
    product({weights + first * stride + key, 1, stride}, rows + first * dim, dim,
            std::min(kProductRows, edge.num_keys - key), dim, edge.num_queries - first, out + key * dim, dim, true);
  }
}

struct ForwardScratch {
  Floats keys, values, query, sums, scores;
  float max_score[kTileQueries];
  float weight[kTileQueries];  // sum of exp(score - max_score)

  ForwardScratch(int64_t num_keys, int dim)
      : keys(make_floats(num_keys * dim)),
        values(make_floats(num_keys * dim)),
        query(make_floats(kTileQueries * dim)),
        sums(make_floats(kTileQueries * dim)),
        scores(make_floats(kTileQueries * kSpanKeys)) {}
};

inline void fill_zeros(float* row, int first, int last) {
  for (int j = first; j < last; j += kLanes) store_lanes(row + j, Lanes{});
}

// Scores of one query's span into weights, of which the first `seen` count and the others become zeros; rescale what
// came before.
inline void update_softmax(ForwardScratch& scratch, int i, int seen, int count, int dim) {
  float* scores = scratch.scores.get() + i * kSpanKeys;
  const int end = static_cast<int>(round_up(seen, kLanes));
  fill_zeros(scores, end, count);
  if (seen == 0) return;
  for (int j = seen; j < end; ++j) scores[j] = kLowest;
  Lanes top = all_lanes(scratch.max_score[i]);
  for (int j = 0; j < seen; j += kLanes) {
    const Lanes s = load_lanes(scores + j);
    top = s > top ? s : top;
  }
  const float max_score = highest_lane(top);
  Lanes total = {};
  for (int j = 0; j < end; j += kLanes) {
    const Lanes weights = exp_nonpositive(load_lanes(scores + j) - max_score);
    store_lanes(scores + j, weights);
    total += weights;
  }
  if (max_score != scratch.max_score[i]) {
    const float rescale = exp_nonpositive(scratch.max_score[i] - max_score);
    float* sums = scratch.sums.get() + i * dim;
    for (int d = 0; d < dim; d += kLanes) store_lanes(sums + d, load_lanes(sums + d) * rescale);
    scratch.weight[i] *= rescale;
    scratch.max_score[i] = max_score;
  }
  scratch.weight[i] += sum_lanes(total);
}

// Queries [first, first + count) of one head over all the keys they see.
template <typename T>
void attend(const AttentionForward<T>& tensors, const AttentionShape& shape, const Context& context, int64_t step,
            int head, int first, int count, ForwardScratch& scratch) {
  const int dim = shape.head_dim;
  float* query = scratch.query.get();
  float* sums = scratch.sums.get();
  float* scores = scratch.scores.get();
  const int64_t start = context.start + first * step;
  gather(tensors.query, head, start, step, count, dim, shape.scale, query);
  std::fill(sums, sums + count * dim, 0.0f);
  std::fill(scratch.max_score, scratch.max_score + count, kLowest);
  std::fill(scratch.weight, scratch.weight + count, 0.0f);

  const int seen_by_first = context.prompt_length + first + 1;
  const int num_keys = seen_by_first + count - 1;  // that the last query sees
  for (int span = 0; span < num_keys; span += kSpanKeys) {
    const CausalEdge edge{seen_by_first - span, count, std::min(kSpanKeys, num_keys - span)};
    for (int j = 0; j < edge.num_keys; j += kTileKeys) {
      const CausalEdge tile{seen_by_first - span - j, count, std::min(kTileKeys, edge.num_keys - j)};
      scores_product(query, scratch.keys.get() + static_cast<int64_t>(span + j) * dim, tile, dim, scores + j,
                     kSpanKeys);
    }
    for (int i = 0; i < count; ++i) update_softmax(scratch, i, edge.seen(i), edge.num_keys, dim);
    weighted_sums(scores, kSpanKeys, scratch.values.get() + static_cast<int64_t>(span) * dim, edge, dim, sums, true);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t token = start + i * step;
    const float inverse = 1.0f / scratch.weight[i];
    T* out = head_of(tensors.out, token, head);
    for (int d = 0; d < dim; d += kLanes) store_lanes(out + d, load_lanes(sums + i * dim + d) * inverse);
    tensors.log_sums[head * shape.num_tokens + token] = scratch.max_score[i] + std::log(scratch.weight[i]);
  }
}

struct BackwardScratch {
  Floats key_tiles, value_tiles, keys, grad_keys, grad_values;  // of one context
  Floats query, grad_out, grad_query, weights, grad_scores;     // of one tile of queries
  float log_sums[kTileQueries];
  float shifts[kTileQueries];  // grad_out . out, which every key's gradient of the score has in common

  BackwardScratch(int64_t num_keys, int dim)
      : key_tiles(make_floats(num_keys * dim)),
        value_tiles(make_floats(num_keys * dim)),
        keys(make_floats(num_keys * dim)),
        grad_keys(make_floats(num_keys * dim)),
        grad_values(make_floats(num_keys * dim)),
        query(make_floats(kTileQueries * dim)),
        grad_out(make_floats(kTileQueries * dim)),
        grad_query(make_floats(kTileQueries * dim)),
        weights(make_floats(kTileQueries * kTileKeys)),
        grad_scores(make_floats(kTileQueries * kTileKeys)) {}
};

// Scores and gradients of the weights, in place, into weights and gradients of the scores; `seen` keys count, the
// others get zeros.
inline void softmax_gradient(float* weights, float* grad_scores, float log_sum, float shift, int seen, int count) {
  const int end = static_cast<int>(round_up(seen, kLanes));
  for (int j = seen; j < end; ++j) weights[j] = kLowest;
  fill_zeros(weights, end, count);
  fill_zeros(grad_scores, end, count);
  for (int j = 0; j < end; j += kLanes) {
    const Lanes w = exp_nonpositive(load_lanes(weights + j) - log_sum);
    store_lanes(weights + j, w);
    store_lanes(grad_scores + j, w * (load_lanes(grad_scores + j) - shift));
  }
}

// Queries [first, first + count) of one head; keys' and values' gradients are added to the scratch.
template <typename T>
void attend_backward(const AttentionBackward<T>& tensors, const AttentionShape& shape, const Context& context,
                     int64_t step, int head, int first, int count, BackwardScratch& scratch) {
  const int dim = shape.head_dim;
  float* query = scratch.query.get();
  float* grad_out = scratch.grad_out.get();
  float* grad_query = scratch.grad_query.get();
  float* weights = scratch.weights.get();
  float* grad_scores = scratch.grad_scores.get();
  const int64_t start = context.start + first * step;
  gather(tensors.query, head, start, step, count, dim, shape.scale, query);
  gather(tensors.grad_out, head, start, step, count, dim, 1.0f, grad_out);
  for (int i = 0; i < count; ++i) {
    const int64_t token = start + i * step;
    const T* out = head_of(tensors.out, token, head);
    Lanes shift = {};
    for (int d = 0; d < dim; d += kLanes) shift += load_lanes(out + d) * load_lanes(grad_out + i * dim + d);
    scratch.shifts[i] = sum_lanes(shift);
    scratch.log_sums[i] = tensors.log_sums[head * shape.num_tokens + token];
  }

  const int seen_by_first = context.prompt_length + first + 1;
  const int num_keys = seen_by_first + count - 1;
  for (int tile = 0; tile < num_keys; tile += kTileKeys) {
    const CausalEdge edge{seen_by_first - tile, count, std::min(kTileKeys, num_keys - tile)};
    const int64_t place = static_cast<int64_t>(tile) * dim;
    scores_product(query, scratch.key_tiles.get() + place, edge, dim, weights, kTileKeys);
    scores_product(grad_out, scratch.value_tiles.get() + place, edge, dim, grad_scores, kTileKeys);
    for (int i = 0; i < count; ++i) {
      softmax_gradient(weights + i * kTileKeys, grad_scores + i * kTileKeys, scratch.log_sums[i], scratch.shifts[i],
                       edge.seen(i), edge.num_keys);
    }
    add_transposed_sums(weights, kTileKeys, grad_out, edge, dim, scratch.grad_values.get() + place);
    add_transposed_sums(grad_scores, kTileKeys, query, edge, dim, scratch.grad_keys.get() + place);
    weighted_sums(grad_scores, kTileKeys, scratch.keys.get() + place, edge, dim, grad_query, tile > 0);
  }
  for (int i = 0; i < count; ++i) {
    T* out = head_of(tensors.grad_query, start + i * step, head);
    for (int d = 0; d < dim; d += kLanes) store_lanes(out + d, load_lanes(grad_query + i * dim + d) * shape.scale);
  }
}

// What the answers to a prompt add to the gradient of its keys and values: [answer][KV head][prompt token][dim], keys
// and values apart, summed up afterwards in a fixed order, so that the result does not depend on the threads.
struct PromptGradients {
  std::vector<int64_t> offsets;  // of each sequence, in rows of num_kv_heads * dim
  Floats keys, values;

  PromptGradients(const PackedSequences& sequences, int num_kv_heads, int dim) : offsets(sequences.count) {
    int64_t num_rows = 0;
    for (int64_t s = 0; s < sequences.count; ++s) {
      offsets[s] = num_rows * num_kv_heads * dim;
      num_rows += Context(sequences, s).prompt_length;
    }
    keys = make_floats(num_rows * num_kv_heads * dim);
    values = make_floats(num_rows * num_kv_heads * dim);
  }
};

template <typename T>
inline void scatter(const float* rows, const TokenHeads<T>& heads, int head, int64_t start, int64_t step, int count,
                    int dim) {
  for (int i = 0; i < count; ++i) {
    T* place = head_of(heads, start + i * step, head);
    for (int d = 0; d < dim; d += kLanes) store_lanes(place + d, load_lanes(rows + i * dim + d));
  }
}

// Add to rows[count][dim] what every answer to sequence `prompt` found.
inline void add_answers(const PackedSequences& sequences, int64_t prompt, const PromptGradients& found,
                        const Floats& gradients, int kv_head, int count, int dim, float* rows) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    if (sequences.parents[s] != prompt) continue;
    const float* part = gradients.get() + found.offsets[s] + static_cast<int64_t>(kv_head) * count * dim;
    for (int64_t i = 0; i < static_cast<int64_t>(count) * dim; i += kLanes) {
      store_lanes(rows + i, load_lanes(rows + i) + load_lanes(part + i));
    }
  }
}

}  // namespace

template <typename T>
void packed_attention_forward(const AttentionForward<T>& tensors, const PackedSequences& sequences,
                              const AttentionShape& shape, int num_threads) {
  const int repeats = shape.num_heads / shape.num_kv_heads;
  const int64_t num_keys = most_keys(sequences);
  Tasks tasks(sequences.count * shape.num_kv_heads);
  run_on_team(num_threads, [&](int) {
    ForwardScratch scratch(num_keys, shape.head_dim);
    for (int64_t task; tasks.take(task);) {
      const Context context(sequences, task / shape.num_kv_heads);
      const int kv_head = static_cast<int>(task % shape.num_kv_heads);
      gather_transposed(tensors.key, kv_head, context, sequences.step, shape.head_dim, scratch.keys.get());
      gather_context(tensors.value, kv_head, context, sequences.step, shape.head_dim, scratch.values.get());
      for (int head = kv_head * repeats; head < (kv_head + 1) * repeats; ++head) {
        for (int first = 0; first < context.length; first += kTileQueries) {
          attend(tensors, shape, context, sequences.step, head, first, std::min(kTileQueries, context.length - first),
                 scratch);
        }
      }
    }
  });
}

template <typename T>
void packed_attention_backward(const AttentionBackward<T>& tensors, const PackedSequences& sequences,
                               const AttentionShape& shape, int num_threads) {
  const int repeats = shape.num_heads / shape.num_kv_heads;
  const int dim = shape.head_dim;
  const int64_t step = sequences.step;
  const int64_t num_keys = most_keys(sequences);
  PromptGradients found(sequences, shape.num_kv_heads, dim);
  // Answers first and prompts last, which then add up what the answers found: two loops.
  for (const bool answers : {true, false}) {
    Tasks tasks(sequences.count * shape.num_kv_heads);
    run_on_team(num_threads, [&](int) {
      BackwardScratch scratch(num_keys, dim);
      float* grad_keys = scratch.grad_keys.get();
      float* grad_values = scratch.grad_values.get();
      for (int64_t task; tasks.take(task);) {
        const int64_t sequence = task / shape.num_kv_heads;
        const int kv_head = static_cast<int>(task % shape.num_kv_heads);
        const Context context(sequences, sequence);
        if ((sequences.parents[sequence] >= 0) != answers) continue;
        gather_transposed(tensors.key, kv_head, context, step, dim, scratch.key_tiles.get());
        gather_transposed(tensors.value, kv_head, context, step, dim, scratch.value_tiles.get());
        gather_context(tensors.key, kv_head, context, step, dim, scratch.keys.get());
        std::fill(grad_keys, grad_keys + context.num_keys() * dim, 0.0f);
        std::fill(grad_values, grad_values + context.num_keys() * dim, 0.0f);
        for (int head = kv_head * repeats; head < (kv_head + 1) * repeats; ++head) {
          for (int first = 0; first < context.length; first += kTileQueries) {
            attend_backward(tensors, shape, context, step, head, first,
                            std::min(kTileQueries, context.length - first), scratch);
          }
        }
        const int prompt_floats = context.prompt_length * dim;
        if (answers) {
          const int64_t offset = found.offsets[sequence] + static_cast<int64_t>(kv_head) * prompt_floats;
          std::copy(grad_keys, grad_keys + prompt_floats, found.keys.get() + offset);
          std::copy(grad_values, grad_values + prompt_floats, found.values.get() + offset);
        } else {
          add_answers(sequences, sequence, found, found.keys, kv_head, context.length, dim, grad_keys);
          add_answers(sequences, sequence, found, found.values, kv_head, context.length, dim, grad_values);
        }
        scatter(grad_keys + prompt_floats, tensors.grad_key, kv_head, context.start, step, context.length, dim);
        scatter(grad_values + prompt_floats, tensors.grad_value, kv_head, context.start, step, context.length, dim);
      }
    });
  }
}

#define XRL_INSTANTIATE(T)                                                                                \
  template void packed_attention_forward<T>(const AttentionForward<T>&, const PackedSequences&,           \
                                            const AttentionShape&, int);                                  \
  template void packed_attention_backward<T>(const AttentionBackward<T>&, const PackedSequences&,         \
                                             const AttentionShape&, int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
