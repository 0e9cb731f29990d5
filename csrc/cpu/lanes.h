// Vectors of as many floats as a register of the instruction set holds, for kernels that the compiler does not
// vectorise well by itself. All functions are static: this file is compiled once per instruction set.
#pragma once

#ifdef __AVX__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_reduce_add_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>

#include "cpu/vector_math.h"

namespace xrl {

#if defined(__AVX512F__)
#define XRL_LANES 16
#elif defined(__AVX__)
#define XRL_LANES 8
#else
#define XRL_LANES 4
#endif

constexpr int kLanes = XRL_LANES;
typedef float Lanes __attribute__((vector_size(4 * XRL_LANES)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * XRL_LANES)));
typedef uint16_t HalfLaneBits __attribute__((vector_size(2 * XRL_LANES)));

static inline Lanes load_lanes(const float* place) {
  Lanes x;
  std::memcpy(&x, place, sizeof x);
  return x;
}

static inline Lanes load_lanes(const bfloat16* place) {
  HalfLaneBits half;
  std::memcpy(&half, place, sizeof half);
  return (Lanes)(__builtin_convertvector(half, LaneBits) << 16);
}

// Two registers of columns. Those of bf16 come in an order of their own, even ones first, which costs less.
static inline void load_two(const float* place, Lanes (&x)[2]) {
  x[0] = load_lanes(place);
  x[1] = load_lanes(place + kLanes);
}

static inline void load_two(const bfloat16* place, Lanes (&x)[2]) {
  LaneBits bits;  // two columns a lane
  std::memcpy(&bits, place, sizeof bits);
  x[0] = (Lanes)(bits << 16);
  x[1] = (Lanes)(bits & 0xffff0000u);
}

static inline void store_lanes(float* place, Lanes x) { std::memcpy(place, &x, sizeof x); }

// With bf16 in the upper halves: rounded to nearest even; a NaN stays one.
static inline LaneBits round_to_bf16(Lanes x) {
  const LaneBits bits = (LaneBits)x;
  const LaneBits quiet = LaneBits{} + 0x7fc00000u;
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : quiet;
}

static inline void store_lanes(bfloat16* place, Lanes x) {
  const HalfLaneBits half = __builtin_convertvector(round_to_bf16(x) >> 16, HalfLaneBits);
  std::memcpy(place, &half, sizeof half);
}

// Not Lanes{} + x, which the compiler must compute: 0 + -0 is 0.
static inline Lanes all_lanes(float x) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (Lanes)_mm256_set1_ps(x);
#else
  return Lanes{x, x, x, x};
#endif
}

static inline float sum_lanes(Lanes x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX__)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

static inline float sum_lanes(float x) { return x; }

static inline float highest_lane(Lanes x) {
  float highest = x[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = x[lane] > highest ? x[lane] : highest;
  return highest;
}

// One element or one vector of elements, as V says: float or Lanes.
template <typename V, typename T>
static inline V load_as(const T* place) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return load(*place);
  } else {
    return load_lanes(place);
  }
}

template <typename T>
static inline void store_as(T* place, float x) {
  store(place, x);
}

template <typename T>
static inline void store_as(T* place, Lanes x) {
  store_lanes(place, x);
}

template <typename V>
constexpr int width_of = sizeof(V) / sizeof(float);

// The vector twin of exp_nonpositive in vector_math.h.
static inline Lanes exp_nonpositive(Lanes x) {
  const Lanes lowest = all_lanes(-87.0f);
  const Lanes clamped = x < lowest ? lowest : x;
  const Lanes shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Lanes power = (Lanes)(((LaneBits)shifted + 127u) << 23);
  return x < lowest ? Lanes{} : p * power;
}

}  // namespace xrl
