// Single instructions that C++ has no name for; sm_80 and later have them all.
#pragma once

#include <cstdint>

namespace xrl::cuda {

// 2^x to 2^-22; 0 below 2^-126, NaN for NaN. exp2f would add three instructions to keep subnormal results.
static __device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, NaN if either is; fmaxf would return the other.
static __device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The larger ones of two pairs of bf16; of a number and NaN the number.
static __device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Two floats as a pair of bf16, rounded to nearest even, the first in the low half.
static __device__ __forceinline__ uint32_t pair_of(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

}  // namespace xrl::cuda
