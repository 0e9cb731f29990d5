// Scalar functions that the compiler turns into vector code, and bf16.
//
// All are static: this file is compiled once per instruction set, and the linker must not merge the copies.
#pragma once

#include <cstdint>
#include <cstring>

namespace xrl {

static inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) for x <= 0, to 2 ulp; 0 below -87 (where fp32 turns subnormal) and for -inf, NaN for NaN.
static inline float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  // exp(x) = 2^n * exp(r), with r in [-ln2/2, ln2/2]; adding 1.5 * 2^23 rounds to the nearest integer.
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = from_bits((to_bits(shifted) + 127u) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

struct bfloat16 {
  uint16_t bits;
};

static inline float load(float value) { return value; }
static inline float load(bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

static inline void store(float* place, float value) { *place = value; }
static inline void store(bfloat16* place, float value) {
  const uint32_t bits = to_bits(value);
  // Round to nearest even; a NaN stays one.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  place->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

}  // namespace xrl
