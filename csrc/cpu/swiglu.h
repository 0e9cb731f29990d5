// SwiGLU of one number or of one vector (arXiv:2002.05202). All functions are static: this file is compiled once per
// instruction set.
#pragma once

#include "cpu/lanes.h"

namespace xrl {

// exp of a number <= 0 only, so that nothing overflows.
static inline float sigmoid(float x) {
  const float e = exp_nonpositive(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

static inline Lanes sigmoid(Lanes x) {
  const Lanes e = exp_nonpositive(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : all_lanes(1.0f)) / (1.0f + e);
}

template <typename V>
static inline V swiglu(V gate, V up) {
  return gate * sigmoid(gate) * up;
}

template <bool kWritesOut, typename V, typename T>
static inline void swiglu_gradient(const T* gate, const T* up, const T* grad, T* d_gate, T* d_up, T* out) {
  // Everything is read before anything is written: the places may be the same.
  const V g = load_as<V>(gate);
  const V u = load_as<V>(up);
  const V d = load_as<V>(grad);
  const V s = sigmoid(g);
  const V silu = g * s;
  store_as(d_gate, d * u * s * (1.0f + g * (1.0f - s)));
  store_as(d_up, d * silu);
  if (kWritesOut) store_as(out, silu * u);
}

template <bool kWritesOut, typename T>
static inline void swiglu_gradient_row(const T* x, const T* grad, int64_t size, T* grad_x, T* out) {
  const T* up = x + size;
  T* d_up = grad_x + size;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    swiglu_gradient<kWritesOut, Lanes>(x + i, up + i, grad + i, grad_x + i, d_up + i, out + i);
  }
  for (; i < size; ++i) swiglu_gradient<kWritesOut, float>(x + i, up + i, grad + i, grad_x + i, d_up + i, out + i);
}

}  // namespace xrl
