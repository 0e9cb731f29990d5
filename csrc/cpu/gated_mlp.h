// The gated MLP of a decoder layer for training, fp32: two products around SwiGLU, a tile of rows at a time, so that
// what lies between them stays in the caches.
#pragma once

#include <cstdint>

#include "cpu/matmul.h"

namespace xrl {

// gate_up [2 * ffn, inputs] with the gate's rows first; down [outputs, ffn]; both contiguous.
struct GatedMlp {
  const float* gate_up;
  const float* down;
  int64_t inputs;
  int64_t ffn;
  int64_t outputs;
};

}  // namespace xrl

#define XRL_DECLARE_GATED_MLP(ISA)                                                                                  \
  namespace xrl::ISA {                                                                                              \
  /* hidden [rows, 2 * ffn] = x gate_up^T; out [rows, outputs] = swiglu(hidden) down^T + addend */                  \
  void gated_mlp_forward(const float* x, const GatedMlp& mlp, const Addend& addend, int64_t rows, float* hidden,    \
                         float* out, int num_threads);                                                              \
  /* hidden becomes its own gradient; activated [rows, ffn] = swiglu(hidden), as it was; grad_x [rows, inputs], */  \
  /* where it is not null, is x's gradient */                                                                       \
  void gated_mlp_backward(const float* grad, const GatedMlp& mlp, int64_t rows, float* hidden, float* activated,    \
                          float* grad_x, int num_threads);                                                          \
  }

XRL_DECLARE_GATED_MLP(scalar)
XRL_DECLARE_GATED_MLP(avx2)
XRL_DECLARE_GATED_MLP(avx512)
