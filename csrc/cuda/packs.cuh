// Logits in packs of 16 bytes, the widest access there is.
#pragma once

#include <cstdint>

#include "cuda/instructions.cuh"
#include "cuda/launch.h"

namespace xrl::cuda {

template <typename T>
constexpr int kPackColumns = 16 / sizeof(T);

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kNotANumber = __builtin_nanf("");

static __device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

static __device__ __forceinline__ float load(const float* place) { return *place; }
static __device__ __forceinline__ float load(const Bfloat16* place) { return low_half(place->bits); }

static __device__ __forceinline__ void store(float* place, float x) { *place = x; }
static __device__ __forceinline__ void store(Bfloat16* place, float x) {
  place->bits = static_cast<uint16_t>(pair_of(x, 0.0f));
}

// 16 bytes as they lie in memory.
template <typename T>
struct Pack;

template <>
struct Pack<float> {
  uint4 words;

  static __device__ __forceinline__ Pack minus_infinity() {
    return {{0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u}};
  }

  __device__ __forceinline__ void unpack(float (&x)[4]) const {
    x[0] = __uint_as_float(words.x);
    x[1] = __uint_as_float(words.y);
    x[2] = __uint_as_float(words.z);
    x[3] = __uint_as_float(words.w);
  }

  static __device__ __forceinline__ Pack of(const float (&x)[4]) {
    return {{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}};
  }
};

template <>
struct Pack<Bfloat16> {
  uint4 words;

  static __device__ __forceinline__ Pack minus_infinity() {
    return {{0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u}};
  }

  __device__ __forceinline__ void unpack(float (&x)[8]) const {
    x[0] = low_half(words.x), x[1] = high_half(words.x);
    x[2] = low_half(words.y), x[3] = high_half(words.y);
    x[4] = low_half(words.z), x[5] = high_half(words.z);
    x[6] = low_half(words.w), x[7] = high_half(words.w);
  }

  static __device__ __forceinline__ Pack of(const float (&x)[8]) {
    return {{pair_of(x[0], x[1]), pair_of(x[2], x[3]), pair_of(x[4], x[5]), pair_of(x[6], x[7])}};
  }
};

// The largest number in some packs; NaN does not count.
template <int kPacks>
static __device__ __forceinline__ float highest(const Pack<float> (&packs)[kPacks]) {
  float found = kMinusInfinity;
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    float x[4];
    packs[pack].unpack(x);
    found = fmaxf(found, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
  }
  return found;
}

// Two at a time: half the instructions.
template <int kPacks>
static __device__ __forceinline__ float highest(const Pack<Bfloat16> (&packs)[kPacks]) {
  uint32_t found = 0xff80ff80u;
#pragma unroll
  for (int pack = 0; pack < kPacks; ++pack) {
    const uint4& words = packs[pack].words;
    found = max_of_pairs(found, max_of_pairs(max_of_pairs(words.x, words.y), max_of_pairs(words.z, words.w)));
  }
  return fmaxf(low_half(found), high_half(found));
}

// Logits pass through once and are larger than any cache: they should not push anything out.
template <typename T>
static __device__ __forceinline__ Pack<T> load_pack(const T* place) {
  return {__ldcs(reinterpret_cast<const uint4*>(place))};
}

template <typename T>
static __device__ __forceinline__ void store_pack(T* place, const Pack<T>& pack) {
  __stcs(reinterpret_cast<uint4*>(place), pack.words);
}

// How many elements after a multiple of 16 bytes an address is.
template <typename T>
static __device__ __forceinline__ int phase(const T* place) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(place) % 16 / sizeof(T));
}

// A row as [head | packs | tail]: packs are aligned, head and tail are the columns before and behind them.
struct RowParts {
  int head;       // columns
  int num_packs;
  int tail_start;  // column
};

// `phase` < 0: there is no place at which packs could begin, all is head.
template <typename T>
static __device__ __forceinline__ RowParts row_parts(int phase, int num_columns) {
  if (phase < 0) return {num_columns, 0, num_columns};
  const int before = phase == 0 ? 0 : kPackColumns<T> - phase;
  const int head = before < num_columns ? before : num_columns;
  const int num_packs = (num_columns - head) / kPackColumns<T>;
  return {head, num_packs, head + num_packs * kPackColumns<T>};
}

}  // namespace xrl::cuda
