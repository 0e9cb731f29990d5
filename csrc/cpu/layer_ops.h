// The element-wise parts of a decoder layer, forward and backward, for training.
#pragma once

#include <cstdint>

#define XRL_DECLARE_LAYER_OPS(ISA)                                                                                  \
  namespace xrl::ISA {                                                                                              \
  /* out[r, c] = silu(x[r, c]) * x[r, c + size], x of rows of 2 * size */                                           \
  template <typename T>                                                                                             \
  void swiglu_forward(const T* x, int64_t num_rows, int64_t size, T* out, int num_threads);                         \
  /* grad_x may be x. out, where it is not null, gets the forward's result again, and may be grad */                \
  template <typename T>                                                                                             \
  void swiglu_backward(const T* x, const T* grad, int64_t num_rows, int64_t size, T* grad_x, T* out,                \
                       int num_threads);                                                                            \
  /* out = x * inverse_rms * weight; inverse_rms[r] = 1 / sqrt(mean(x[r]^2) + eps) is kept for the backward */      \
  template <typename T>                                                                                             \
  void rms_norm_forward(const T* x, const T* weight, int64_t num_rows, int64_t size, float eps, T* out,             \
                        float* inverse_rms, int num_threads);                                                       \
  /* grad_x = x's gradient + addend, where that is not null; grad_weight [num_threads, size]: each thread's sum, */ \
  /* to be added up by the caller */                                                                                \
  template <typename T>                                                                                             \
  void rms_norm_backward(const T* x, const T* weight, const float* inverse_rms, const T* grad, const T* addend,     \
                         int64_t num_rows, int64_t size, T* grad_x, float* grad_weight, int num_threads);           \
  /* half-split rotary embedding of [tokens, heads, dim]; cosine and sine [tokens, dim]; sign -1 turns it back */   \
  template <typename T>                                                                                             \
  void rotary(const T* x, const T* cosine, const T* sine, int64_t num_tokens, int64_t num_heads, int64_t dim,       \
              float sign, T* out, int num_threads);                                                                 \
  }

XRL_DECLARE_LAYER_OPS(scalar)
XRL_DECLARE_LAYER_OPS(avx2)
XRL_DECLARE_LAYER_OPS(avx512)
