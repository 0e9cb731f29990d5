// Causal attention over packed sequences, forward and backward; a sequence may continue another one, which is its
// prompt then and stands in the pack once, however many answers continue it.
#pragma once

#include <cstdint>

#include "cpu/vector_math.h"

namespace xrl {

// Heads of the tokens of a pack: head h of token t stands at data + t * token_stride + h * head_stride, its elements
// side by side.
template <typename T>
struct TokenHeads {
  T* data;
  int64_t token_stride;
  int64_t head_stride;
};

// Heads that lie side by side in a token.
template <typename T>
TokenHeads<T> dense_heads(T* place, int num_heads, int head_dim) {
  return {place, static_cast<int64_t>(num_heads) * head_dim, head_dim};
}

// Token i of sequence s is token starts[s] + i * step of the pack.
struct PackedSequences {
  const int32_t* starts;
  const int32_t* lengths;
  const int32_t* parents;  // the sequence it continues, which continues none itself; -1 where there is none
  int64_t count;
  int64_t step;
};

struct AttentionShape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int64_t num_tokens;
  float scale;  // of the scores
};

// log_sums[h * num_tokens + t] is the logarithm of the sum of exp(score), which the backward pass needs.
template <typename T>
struct AttentionForward {
  TokenHeads<const T> query, key, value;
  TokenHeads<T> out;
  float* log_sums;
};

template <typename T>
struct AttentionBackward {
  TokenHeads<const T> query, key, value, out, grad_out;
  const float* log_sums;
  TokenHeads<T> grad_query, grad_key, grad_value;
};


}  // namespace xrl

#define XRL_DECLARE_PACKED_ATTENTION(ISA)                                                                        \
  namespace xrl::ISA {                                                                                           \
  template <typename T>                                                                                          \
  void packed_attention_forward(const AttentionForward<T>& tensors, const PackedSequences& sequences,            \
                                const AttentionShape& shape, int num_threads);                                   \
  template <typename T>                                                                                          \
  void packed_attention_backward(const AttentionBackward<T>& tensors, const PackedSequences& sequences,          \
                                 const AttentionShape& shape, int num_threads);                                  \
  }

XRL_DECLARE_PACKED_ATTENTION(scalar)
XRL_DECLARE_PACKED_ATTENTION(avx2)
XRL_DECLARE_PACKED_ATTENTION(avx512)
