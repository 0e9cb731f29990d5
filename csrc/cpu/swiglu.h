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

}  // namespace xrl
