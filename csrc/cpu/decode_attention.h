// Attention of one new token a row over a paged KV cache in which the rows of a group share their prompt.
#pragma once

#include <cstdint>

namespace xrl {

// Keys and values in blocks of tokens: [num_blocks, num_kv_heads, block_size, head_dim].
template <typename T>
struct PagedCache {
  const T* keys;
  const T* values;
  int num_kv_heads;
  int block_size;  // divides kSpanTokens
  int head_dim;    // one of those that decode_attention is built for
};

constexpr int kSpanTokens = 128;      // scored before the softmax is brought up to date; their scores stay in L1
constexpr int kMaxQueriesPerHead = 32;  // query heads that share a KV head

// Rows of a decode batch and where their contexts lie; see PagedContext in xrl/kernels/decode/decode_attention.py.
struct PagedRows {
  const int32_t* group_starts;    // [num_groups + 1]
  const int32_t* prompt_blocks;   // [num_groups, prompt_blocks_columns], rows prompt_blocks_stride apart
  const int32_t* prompt_lengths;  // [num_groups]
  const int32_t* row_blocks;      // [num rows, row_blocks_columns]
  const int32_t* row_lengths;     // [num rows]
  int num_groups;
  int64_t prompt_blocks_stride;
  int64_t prompt_blocks_columns;
  int64_t row_blocks_stride;
  int64_t row_blocks_columns;
};

// query: [num rows, num_heads, head_dim], rows query_stride elements apart; out: the same, contiguous.
template <typename T>
struct DecodeQueries {
  const T* query;
  T* out;
  int num_heads;
  int64_t query_stride;
};

}  // namespace xrl

#define XRL_DECLARE_DECODE_ATTENTION(ISA)                                                                           \
  namespace xrl::ISA {                                                                                              \
  template <typename T>                                                                                             \
  void decode_attention(const DecodeQueries<T>& queries, const PagedCache<T>& cache, const PagedRows& rows,         \
                        int num_threads);                                                                           \
  }

XRL_DECLARE_DECODE_ATTENTION(scalar)
XRL_DECLARE_DECODE_ATTENTION(avx2)
XRL_DECLARE_DECODE_ATTENTION(avx512)
