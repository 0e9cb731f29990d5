// What stands between the QKV product and attention in training: QK norm and rotary embedding, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/packed_attention.h"
#include "cpu/vector_math.h"

namespace xrl {

// The product's output as megatron-core lays it out: for each token and KV head, the query heads that share it, then its
// key, then its value.
struct QkvShape {
  int64_t num_tokens;
  int num_kv_heads;
  int queries_per_key;
  int head_dim;
};

// The values inside of it.
template <typename T>
TokenHeads<T> values_of(T* mixed, const QkvShape& shape) {
  const int64_t head_stride = static_cast<int64_t>(shape.queries_per_key + 2) * shape.head_dim;
  return {mixed + (shape.queries_per_key + 1) * shape.head_dim, shape.num_kv_heads * head_stride, head_stride};
}

inline AttentionShape attention_shape(const QkvShape& shape, float scale) {
  return {shape.num_kv_heads * shape.queries_per_key, shape.num_kv_heads, shape.head_dim, shape.num_tokens, scale};
}

// cosine, sine: [num_tokens, head_dim]. q_weight and k_weight [head_dim] are null where heads are not normalised.
template <typename T>
struct QkvRope {
  const T* cosine;
  const T* sine;
  const T* q_weight;
  const T* k_weight;
  float eps;
};

}  // namespace xrl

// qkv_rope_forward: mixed -> query [num_tokens, num_heads, head_dim], key [num_tokens, num_kv_heads, head_dim].
// qkv_rope_backward: their gradients -> the query's and the key's part of grad_mixed, and sums over each thread's tokens
// in grad_weights [num_threads, 2, head_dim], of the query's weight and of the key's.
#define XRL_DECLARE_QKV_ROPE(ISA)                                                                                   \
  namespace xrl::ISA {                                                                                              \
  template <typename T>                                                                                             \
  void qkv_rope_forward(const T* mixed, const QkvShape& shape, const QkvRope<T>& rope, T* query, T* key,            \
                        int num_threads);                                                                           \
  template <typename T>                                                                                             \
  void qkv_rope_backward(const T* mixed, const T* grad_query, const T* grad_key, const QkvShape& shape,             \
                         const QkvRope<T>& rope, T* grad_mixed, float* grad_weights, int num_threads);              \
  }

XRL_DECLARE_QKV_ROPE(scalar)
XRL_DECLARE_QKV_ROPE(avx2)
XRL_DECLARE_QKV_ROPE(avx512)
