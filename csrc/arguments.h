// Arguments that several bindings take.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "address.h"
#include "check.h"
#include "cpu/decode_attention.h"
#include "cpu/packed_attention.h"
#include "cpu/qkv_rope.h"

namespace xrl {

inline void check_sizes(int64_t num_rows, int64_t size, int num_threads) {
  check(num_rows >= 0 && size >= 1, "num_rows must be >= 0 and size >= 1");
  check(num_threads >= 1, "num_threads must be >= 1, got " + std::to_string(num_threads));
}

inline void check_attention(int num_heads, int num_kv_heads, int block_size) {
  check(num_kv_heads >= 1 && num_heads >= 1, "num_heads and num_kv_heads must be >= 1");
  check(num_heads % num_kv_heads == 0 && num_heads / num_kv_heads <= kMaxQueriesPerHead,
        "num_heads must be a multiple of num_kv_heads, at most " + std::to_string(kMaxQueriesPerHead) +
            " times as many");
  check(block_size > 0 && kSpanTokens % block_size == 0,
        "block_size must divide " + std::to_string(kSpanTokens) + ", got " + std::to_string(block_size));
}

// (group_starts, num_groups, prompt_blocks, its row stride, its columns, prompt_lengths, row_blocks, its row stride, its
// columns, row_lengths)
using PagedRowsTuple =
    std::tuple<Address, int, Address, int64_t, int64_t, Address, Address, int64_t, int64_t, Address>;

inline PagedRows paged_rows(const PagedRowsTuple& tuple) {
  const auto& [group_starts, num_groups, prompt_blocks, prompt_blocks_stride, prompt_blocks_columns, prompt_lengths,
               row_blocks, row_blocks_stride, row_blocks_columns, row_lengths] = tuple;
  return {at<const int32_t>(group_starts),
          at<const int32_t>(prompt_blocks),
          at<const int32_t>(prompt_lengths),
          at<const int32_t>(row_blocks),
          at<const int32_t>(row_lengths),
          num_groups,
          prompt_blocks_stride,
          prompt_blocks_columns,
          row_blocks_stride,
          row_blocks_columns};
}

// Sequences of a pack: the addresses of starts, lengths and parents, their number and the step between their tokens.
using SequencesTuple = std::tuple<Address, Address, Address, int64_t, int64_t>;

inline PackedSequences packed_sequences(const SequencesTuple& tuple) {
  const auto& [starts, lengths, parents, count, step] = tuple;
  return {at<const int32_t>(starts), at<const int32_t>(lengths), at<const int32_t>(parents), count, step};
}

// (num_tokens, num_kv_heads, queries_per_key, head_dim)
using QkvTuple = std::tuple<int64_t, int, int, int>;

inline QkvShape qkv_shape(const QkvTuple& tuple) {
  const auto& [num_tokens, num_kv_heads, queries_per_key, head_dim] = tuple;
  check(num_kv_heads >= 1 && queries_per_key >= 1, "num_kv_heads and queries_per_key must be >= 1");
  check(head_dim > 0 && head_dim % 16 == 0, "head_dim must be a multiple of 16, got " + std::to_string(head_dim));
  return {num_tokens, num_kv_heads, queries_per_key, head_dim};
}

}  // namespace xrl
