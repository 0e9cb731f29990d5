// What the rms_norm and rope_cache kernels share.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/lanes.h"

namespace xrl {

// x through the number format of memory.
static inline float rounded_to(const float*, float x) { return x; }
static inline float rounded_to(const bfloat16*, float x) {
  bfloat16 narrow;
  store(&narrow, x);
  return load(narrow);
}

// 1 / sqrt(mean(x^2) + eps)
template <typename T>
static inline float inverse_rms(const T* x, int64_t size, float eps) {
  Lanes squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Lanes lanes = load_lanes(x + i);
    squares += lanes * lanes;
  }
  float total = sum_lanes(squares);
  for (; i < size; ++i) total += load(x[i]) * load(x[i]);
  return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}

}  // namespace xrl
