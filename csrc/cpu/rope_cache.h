// From the QKV product to attention: norms of the heads, rotary embedding, KV-cache write.
#pragma once

#include <cstdint>

namespace xrl {

// Queries, keys and values of tokens side by side, and where their keys and values are stored.
template <typename T>
struct QkvTokens {
  T* qkv;  // [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
  int64_t num_tokens;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  const int32_t* positions;  // [num_tokens]
  const int32_t* slots;      // [num_tokens] block * block_size + offset, or -1
  T* keys;                   // [num_blocks, num_kv_heads, block_size, head_dim]
  T* values;
  int block_size;
};

// What rotates and normalises a head.
template <typename T>
struct RopeNorm {
  const float* cos;  // [max_positions, head_dim / 2]
  const float* sin;
  const T* q_norm;  // [head_dim] or null
  const T* k_norm;
  float eps;
};

}  // namespace xrl

#define XRL_DECLARE_ROPE_CACHE(ISA)                                                                                  \
  namespace xrl::ISA {                                                                                               \
  template <typename T>                                                                                              \
  void rope_cache(const QkvTokens<T>& tokens, const RopeNorm<T>& rope, int num_threads);                             \
  }

XRL_DECLARE_ROPE_CACHE(scalar)
XRL_DECLARE_ROPE_CACHE(avx2)
XRL_DECLARE_ROPE_CACHE(avx512)
