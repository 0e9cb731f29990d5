// Decoding is bound by memory, so keys and values are read as rarely as they can be: query heads that share a KV head
// are scored together, and so are the rows of a group over their common prompt. The softmax is online
// (arXiv:1805.02867): each span of the context rescales what the spans before it have summed up.
#include "cpu/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/lanes.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

constexpr int kTileQueries = 16;  // queries of one group scored together over the prompt
constexpr int kMaxTile = std::max(kTileQueries, kMaxQueriesPerHead);
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Queries that share a KV head, and their softmax-weighted sums over the context seen so far.
template <int D>
struct Tile {
  alignas(64) float query[kMaxTile][D];  // divided by sqrt(D)
  alignas(64) float sum[kMaxTile][D];    // values weighted by exp(score - max_score)
  alignas(64) float scores[kMaxTile][kSpanTokens];
  float max_score[kMaxTile];
  float weight[kMaxTile];  // sum of exp(score - max_score)
};

// One KV head's part of the cache.
template <typename T>
struct Head {
  const T* keys;
  const T* values;
  int64_t block_stride;
  int block_size;
};

// A context is read block by block from scattered places, which hardware prefetchers do not foresee.
template <int D, typename T>
inline void prefetch_token(const T* place) {
  for (int d = 0; d < D; d += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(place + d);
}

// scores[i][j] = query[i] . keys[j] for Q queries and `count` tokens, fetching the block that comes next.
template <int D, int Q, typename T>
inline void score(const float (*query)[D], const T* keys, const T* next, int count, float* scores) {
  Lanes q[Q][D / kLanes];
  for (int i = 0; i < Q; ++i) {
    for (int w = 0; w < D / kLanes; ++w) q[i][w] = load_lanes(query[i] + w * kLanes);
  }
  for (int j = 0; j < count; ++j) {
    prefetch_token<D>(next + j * D);
    Lanes products[Q] = {};
    for (int w = 0; w < D / kLanes; ++w) {
      const Lanes key = load_lanes(keys + j * D + w * kLanes);
      for (int i = 0; i < Q; ++i) products[i] += q[i][w] * key;
    }
    for (int i = 0; i < Q; ++i) scores[i * kSpanTokens + j] = sum_lanes(products[i]);
  }
}

// sum[i] += sum_j weights[i][j] * values[j] for Q queries and `count` tokens, fetching the block that comes next.
template <int D, int Q, typename T>
inline void accumulate(const float* weights, const T* values, const T* next, int count, float (*sum)[D]) {
  Lanes sums[Q][D / kLanes];
  for (int i = 0; i < Q; ++i) {
    for (int w = 0; w < D / kLanes; ++w) sums[i][w] = load_lanes(sum[i] + w * kLanes);
  }
  for (int j = 0; j < count; ++j) {
    prefetch_token<D>(next + j * D);
    for (int w = 0; w < D / kLanes; ++w) {
      const Lanes value = load_lanes(values + j * D + w * kLanes);
      for (int i = 0; i < Q; ++i) sums[i][w] += weights[i * kSpanTokens + j] * value;
    }
  }
  for (int i = 0; i < Q; ++i) {
    for (int w = 0; w < D / kLanes; ++w) store_lanes(sum[i] + w * kLanes, sums[i][w]);
  }
}

// Turn the scores of query i's span into weights and rescale what came before.
template <int D>
inline void update_softmax(Tile<D>& tile, int i, int count) {
  float* scores = tile.scores[i];
  for (int j = count; j % kLanes != 0; ++j) scores[j] = kLowest;
  Lanes top = all_lanes(tile.max_score[i]);
  for (int j = 0; j < count; j += kLanes) {
    const Lanes s = load_lanes(scores + j);
    top = s > top ? s : top;
  }
  const float max_score = highest_lane(top);
  Lanes total = {};
  for (int j = 0; j < count; j += kLanes) {
    const Lanes weights = exp_nonpositive(load_lanes(scores + j) - max_score);
    store_lanes(scores + j, weights);
    total += weights;
  }
  const float rescale = exp_nonpositive(tile.max_score[i] - max_score);
  tile.max_score[i] = max_score;
  tile.weight[i] = tile.weight[i] * rescale + sum_lanes(total);
  for (int d = 0; d < D; d += kLanes) store_lanes(tile.sum[i] + d, load_lanes(tile.sum[i] + d) * rescale);
}

// Let queries [first, last) of the tile attend to the `length` tokens in `blocks`.
template <int D, typename T>
void attend(Tile<D>& tile, int first, int last, const Head<T>& head, const int32_t* blocks, int length) {
  for (int start = 0; start < length; start += kSpanTokens) {
    const int count = std::min(kSpanTokens, length - start);
    const int32_t* span = blocks + start / head.block_size;
    for (int j = 0; j < count; j += head.block_size) {
      const int32_t* block = span + j / head.block_size;
      const int tokens = std::min(head.block_size, count - j);
      const bool is_last = j + head.block_size >= count;
      const T* keys = head.keys + block[0] * head.block_stride;
      const T* next = is_last ? head.values + span[0] * head.block_stride : head.keys + block[1] * head.block_stride;
      int i = first;
      for (; i + 1 < last; i += 2) score<D, 2>(&tile.query[i], keys, next, tokens, &tile.scores[i][j]);
      if (i < last) score<D, 1>(&tile.query[i], keys, next, tokens, &tile.scores[i][j]);
    }
    for (int i = first; i < last; ++i) update_softmax(tile, i, count);
    for (int j = 0; j < count; j += head.block_size) {
      const int32_t* block = span + j / head.block_size;
      const int tokens = std::min(head.block_size, count - j);
      const bool is_last = j + head.block_size >= count;
      const T* values = head.values + block[0] * head.block_stride;
      const T* next = is_last ? values : head.values + block[1] * head.block_stride;
      int i = first;
      for (; i + 1 < last; i += 2) accumulate<D, 2>(&tile.scores[i][j], values, next, tokens, &tile.sum[i]);
      if (i < last) accumulate<D, 1>(&tile.scores[i][j], values, next, tokens, &tile.sum[i]);
    }
  }
}

// Rows [first_row, last_row) of one group.
struct Work {
  int group;
  int first_row;
  int last_row;
};

template <int D, typename T>
void attend_rows(Tile<D>& tile, const Work& work, int kv_head, const DecodeQueries<T>& queries,
                 const PagedCache<T>& cache, const PagedRows& rows) {
  const int repeats = queries.num_heads / cache.num_kv_heads;
  const int64_t head_stride = static_cast<int64_t>(cache.block_size) * D;
  const Head<T> head = {cache.keys + kv_head * head_stride, cache.values + kv_head * head_stride,
                        cache.num_kv_heads * head_stride, cache.block_size};
  const int num_queries = (work.last_row - work.first_row) * repeats;
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  for (int i = 0; i < num_queries; ++i) {
    const int64_t row = work.first_row + i / repeats;
    const T* query = queries.query + row * queries.query_stride + (kv_head * repeats + i % repeats) * D;
    for (int d = 0; d < D; d += kLanes) {
      store_lanes(tile.query[i] + d, load_lanes(query + d) * scale);
      store_lanes(tile.sum[i] + d, Lanes{});
    }
    tile.max_score[i] = kLowest;
    tile.weight[i] = 0.0f;
  }
  const int32_t* prompt = rows.prompt_blocks + work.group * rows.prompt_blocks_stride;
  attend(tile, 0, num_queries, head, prompt, rows.prompt_lengths[work.group]);
  for (int64_t row = work.first_row; row < work.last_row; ++row) {
    const int first = static_cast<int>(row - work.first_row) * repeats;
    attend(tile, first, first + repeats, head, rows.row_blocks + row * rows.row_blocks_stride, rows.row_lengths[row]);
    for (int i = 0; i < repeats; ++i) {
      const float weight = tile.weight[first + i];
      const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;  // a padding row has no context
      T* out = queries.out + (row * queries.num_heads + kv_head * repeats + i) * D;
      for (int d = 0; d < D; d += kLanes) store_lanes(out + d, load_lanes(tile.sum[first + i] + d) * inverse);
    }
  }
}

template <int D, typename T>
void attend_all(const DecodeQueries<T>& queries, const PagedCache<T>& cache, const PagedRows& rows, int num_threads) {
  const int tile_rows = std::max(1, kTileQueries / (queries.num_heads / cache.num_kv_heads));
  const int num_rows = rows.group_starts[rows.num_groups];
  const std::unique_ptr<Work[]> work(new Work[num_rows]);
  int num_work = 0;
  for (int group = 0; group < rows.num_groups; ++group) {
    const int end = rows.group_starts[group + 1];
    for (int row = rows.group_starts[group]; row < end; row += tile_rows) {
      work[num_work++] = {group, row, std::min(row + tile_rows, end)};
    }
  }
  Tasks tasks(static_cast<int64_t>(num_work) * cache.num_kv_heads);
  run_on_team(num_threads, [&](int) {
    Tile<D> tile;
    for (int64_t task; tasks.take(task);) {
      attend_rows(tile, work[task / cache.num_kv_heads], task % cache.num_kv_heads, queries, cache, rows);
    }
  });
}

}  // namespace

template <typename T>
void decode_attention(const DecodeQueries<T>& queries, const PagedCache<T>& cache, const PagedRows& rows,
                      int num_threads) {
  switch (cache.head_dim) {
    case 16:
      return attend_all<16>(queries, cache, rows, num_threads);
    case 32:
      return attend_all<32>(queries, cache, rows, num_threads);
    case 64:
      return attend_all<64>(queries, cache, rows, num_threads);
    case 128:
      return attend_all<128>(queries, cache, rows, num_threads);
  }
}

template void decode_attention<float>(const DecodeQueries<float>&, const PagedCache<float>&, const PagedRows&, int);
template void decode_attention<bfloat16>(const DecodeQueries<bfloat16>&, const PagedCache<bfloat16>&,
                                         const PagedRows&, int);

}  // namespace xrl::XRL_ISA
