// One row of logits: its softmax statistics, and the gradient of its log-prob and entropy. Exponentials are taken to
// the base 2, so that scaling by 1 / temperature and by log2(e) is one product.
//
// All functions are static: this file is compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/lanes.h"
#include "cpu/vector_math.h"

namespace xrl {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLowestExponent = -160.0f;
// Columns summed in fp32, before they are added up in fp64.
constexpr int64_t kBlockColumns = 2048;

// s = (logit - maximum) / temperature: subtracted first, so that logits of any size keep their digits.
struct SoftmaxSums {
  float maximum;           // of the logits; -inf where no column counts
  double sum_exp;          // sum of exp(s)
  double sum_exp_shifted;  // sum of exp(s) * s
};

// Exponents are held at this one: its power of 2 rounds to 0, and 0 times it is 0, where 0 * -inf would be NaN.
static inline Lanes hold_exponent(Lanes t) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_max_ps(_mm512_set1_ps(kLowestExponent), (__m512)t);  // a NaN in t comes through
#else
  const Lanes lowest = all_lanes(kLowestExponent);
  return t < lowest ? lowest : t;  // false for NaN, which goes on
#endif
}

// 2^t for kLowestExponent <= t, to 2e-7; exactly 1 for 0, NaN for NaN.
static inline Lanes exp2_lanes(Lanes t) {
#if defined(__AVX512F__)
  // Its place above the next lower integer, and below, that integer's power: both are single instructions.
  const Lanes r = (Lanes)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  // Minimax polynomial of 2^r on [0, 1).
  Lanes p = r * 1.867130070e-3f + 9.017030322e-3f;
  p = p * r + 5.579991310e-2f;
  p = p * r + 2.401644502e-1f;
  p = p * r + 6.931513118e-1f;
  p = p * r + 1.0f;
  return (Lanes)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  const Lanes shifted = t + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Lanes r = t - (shifted - 12582912.0f);
  // Minimax polynomial of 2^r on [-1/2, 1/2].
  Lanes p = r * 1.321867248e-3f + 9.671697938e-3f;
  p = p * r + 5.550892952e-2f;
  p = p * r + 2.402223800e-1f;
  p = p * r + 6.931468559e-1f;
  p = p * r + 1.0f;
  // Without scalef the exponent bits are shifted in, which has no way to 0: what is below the normal numbers is cut.
  const Lanes power = (Lanes)(((LaneBits)shifted + 127u) << 23);
  return t < all_lanes(-126.0f) ? Lanes{} : p * power;
#endif
}

// The last columns of a row, fewer than a register holds; the rest of the register is filled with -inf.
template <typename T>
static inline Lanes load_tail(const T* place, int64_t count) {
  Lanes x = all_lanes(-std::numeric_limits<float>::infinity());
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = load(place[lane]);
  return x;
}

static inline Lanes larger(Lanes a, Lanes b) { return b > a ? b : a; }

// Without names, as the linker would merge members.
namespace {
// Columns of a block, their exponentials summed. `scale` is log2(e) / temperature.
struct BlockSums {
  Lanes highest = all_lanes(-std::numeric_limits<float>::infinity());
  Lanes exp{};
  Lanes shifted{};

  inline void add(Lanes logits, float reference, float scale) {
    highest = larger(highest, logits);
    const Lanes t = hold_exponent((logits - reference) * scale);
    const Lanes e = exp2_lanes(t);
    exp += e;
    shifted += e * t;
  }
};

// Over a row: sums of 2^t and 2^t * t, with t = (logit - reference) * scale.
struct RowSums {
  float reference;
  double exp;
  double shifted;

  // As if `raised`, which is not below it, had been the reference.
  inline void raise_reference(float raised, float scale) {
    const double shift = (static_cast<double>(reference) - raised) * scale;
    const double factor = std::exp2(shift);
    // 2^(t + s) * (t + s) = 2^s * (2^t * t + 2^t * s); where 2^s is 0, so is all of it.
    shifted = factor == 0.0 ? 0.0 : factor * (shifted + exp * shift);
    exp *= factor;
    reference = raised;
  }
};
}  // namespace

template <typename T>
static inline BlockSums block_sums(const T* block, int64_t count, float reference, float scale) {
  const int64_t whole = count - count % (4 * kLanes);
  BlockSums a, b, c, d;
  for (int64_t column = 0; column < whole; column += 4 * kLanes) {
    Lanes first[2], second[2];  // in any order: they are summed
    load_two(block + column, first);
    load_two(block + column + 2 * kLanes, second);
    a.add(first[0], reference, scale);
    b.add(first[1], reference, scale);
    c.add(second[0], reference, scale);
    d.add(second[1], reference, scale);
  }
  for (int64_t column = whole; column < count; column += kLanes) {
    const int64_t rest = count - column;
    a.add(rest < kLanes ? load_tail(block + column, rest) : load_lanes(block + column), reference, scale);
  }
  a.highest = larger(larger(a.highest, b.highest), larger(c.highest, d.highest));
  a.exp = (a.exp + b.exp) + (c.exp + d.exp);
  a.shifted = (a.shifted + b.shifted) + (c.shifted + d.shifted);
  return a;
}

template <typename T>
static inline float highest_logit(const T* block, int64_t count) {
  Lanes highest = all_lanes(-std::numeric_limits<float>::infinity());
  for (int64_t column = 0; column < count; column += kLanes) {
    const int64_t rest = count - column;
    highest = larger(highest, rest < kLanes ? load_tail(block + column, rest) : load_lanes(block + column));
  }
  return highest_lane(highest);
}

// Sums over a row, read once. What is subtracted from the logits need not be their maximum, only near it: the maximum
// of the first block serves until one goes beyond it by kFar. More, and the largest term, which is not exactly 1 then,
// would bring an error into the sum that counts beside 1 - p of a token with p near 1.
template <typename T>
static inline SoftmaxSums softmax_sums(const T* x, int64_t num_columns, float inverse_temperature) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  constexpr float kFar = 4.0f;  // powers of 2
  const float scale = inverse_temperature * kLog2E;
  float highest = kNone;  // of the raw logits
  RowSums sums{kNone, 0.0, 0.0};
  for (int64_t start = 0; start < num_columns; start += kBlockColumns) {
    const int64_t count = num_columns - start < kBlockColumns ? num_columns - start : kBlockColumns;
    if (sums.reference == kNone) sums.reference = highest_logit(x + start, count);
    // As long as there was nothing but -inf, 0 will do: exponentials of -inf are 0.
    BlockSums block = block_sums(x + start, count, sums.reference == kNone ? 0.0f : sums.reference, scale);
    const float block_highest = highest_lane(block.highest);
    if ((block_highest - sums.reference) * scale > kFar) {
      sums.raise_reference(block_highest, scale);
      block = block_sums(x + start, count, sums.reference, scale);
    }
    highest = block_highest > highest ? block_highest : highest;
    sums.exp += sum_lanes(block.exp);
    sums.shifted += sum_lanes(block.shifted);
  }
  if (highest != sums.reference) sums.raise_reference(highest, scale);
  return {highest, sums.exp, sums.shifted * kLn2};
}

// What the gradient of a row is made of: d loss / d logit_v = -p_v * (on_logprob + on_entropy * (logp_v + entropy)),
// and on_logprob more at the target; both are divided by the temperature already.
struct RowGradient {
  float maximum;  // of the logits
  float log_sum;  // log of the sum of exp((logit - maximum) / temperature)
  float entropy;
  float on_logprob;
  float on_entropy;
};

// Writes a register past the caches where the line is not read again soon, `place` aligned to it.
template <bool kStream>
static inline void write_bytes(void* place, Lanes x) {
#if defined(__AVX512F__)
  if (kStream) return _mm512_stream_ps(static_cast<float*>(place), (__m512)x);
#elif defined(__AVX__)
  if (kStream) return _mm256_stream_ps(static_cast<float*>(place), (__m256)x);
#endif
  std::memcpy(place, &x, sizeof x);
}

// What load_two has read, in its order.
template <bool kStream>
static inline void write_two(float* place, Lanes first, Lanes second) {
  write_bytes<kStream>(place, first);
  write_bytes<kStream>(place + kLanes, second);
}

template <bool kStream>
static inline void write_two(bfloat16* place, Lanes even, Lanes odd) {
  write_bytes<kStream>(place, (Lanes)((round_to_bf16(even) >> 16) | (round_to_bf16(odd) & 0xffff0000u)));
}

template <bool kEntropy>
static inline Lanes gradient_lanes(Lanes logits, float scale, const RowGradient& row) {
  // A log-prob is at most 0 but for rounding, which does no harm here.
  const Lanes t = hold_exponent((logits - row.maximum) * scale - row.log_sum * kLog2E);
  const Lanes p = exp2_lanes(t);
  if (!kEntropy) return p * -row.on_logprob;
  return -p * (row.on_logprob + row.on_entropy * (t * kLn2 + row.entropy));
}

template <typename T, bool kEntropy, bool kStream>
static inline void row_gradient(const T* x, int64_t num_columns, float inverse_temperature, const RowGradient& row,
                                T* out) {
  const float scale = inverse_temperature * kLog2E;
  const auto one = [&](int64_t column) {
    store(out + column, gradient_lanes<kEntropy>(all_lanes(load(x[column])), scale, row)[0]);
  };
  int64_t column = 0;
  if (kStream) {
    while (column < num_columns && reinterpret_cast<std::uintptr_t>(out + column) % sizeof(Lanes) != 0) one(column++);
  }
  for (; column + 2 * kLanes <= num_columns; column += 2 * kLanes) {
    Lanes logits[2];
    load_two(x + column, logits);
    write_two<kStream>(out + column, gradient_lanes<kEntropy>(logits[0], scale, row),
                       gradient_lanes<kEntropy>(logits[1], scale, row));
  }
  while (column < num_columns) one(column++);
}

// The column of a token, or a number that is no column's. A masked row's id may be anything: the difference comes round
// instead of overflowing, and to no column, as vocab_start is at most 2^62.
static inline int64_t column_of(int64_t token_id, int64_t vocab_start) {
  return static_cast<int64_t>(static_cast<uint64_t>(token_id) - static_cast<uint64_t>(vocab_start));
}

// s of the chosen token; 0 where it is on another shard.
template <typename T>
static inline float shifted_target(const T* x, int64_t num_columns, int64_t target, float maximum,
                                   float inverse_temperature) {
  if (target < 0 || target >= num_columns) return 0.0f;
  // A row of nothing but -inf has no maximum to subtract.
  if (maximum == -std::numeric_limits<float>::infinity()) return load(x[target]);
  return (load(x[target]) - maximum) * inverse_temperature;
}

// At the target, 1 - p takes the place of -p; expm1 keeps its digits where p is nearly 1.
static inline float target_gradient(float logit, float inverse_temperature, const RowGradient& row) {
  const float logp = (logit - row.maximum) * inverse_temperature - row.log_sum;
  const float p = std::exp(logp);
  const float on_entropy = p > 0.0f ? row.on_entropy * p * (logp + row.entropy) : 0.0f;
  return -row.on_logprob * std::expm1(logp) - on_entropy;
}

// A row of the gradient, target and padding included. A row without one is not even read.
template <typename T>
static inline void write_gradient(const T* x, int64_t num_columns, int64_t target, float inverse_temperature,
                                  const RowGradient& row, T* out, int64_t num_out_columns) {
  const bool counts = row.on_logprob != 0.0f || row.on_entropy != 0.0f;
  if (counts) {
    const bool owned = target >= 0 && target < num_columns;
    const float target_logit = owned ? load(x[target]) : 0.0f;  // before it may be overwritten
    const bool in_place = out == x;
    if (row.on_entropy != 0.0f) {
      in_place ? row_gradient<T, true, false>(x, num_columns, inverse_temperature, row, out)
               : row_gradient<T, true, true>(x, num_columns, inverse_temperature, row, out);
    } else {
      in_place ? row_gradient<T, false, false>(x, num_columns, inverse_temperature, row, out)
               : row_gradient<T, false, true>(x, num_columns, inverse_temperature, row, out);
    }
    if (owned) store(out + target, target_gradient(target_logit, inverse_temperature, row));
  }
  for (int64_t column = counts ? num_columns : 0; column < num_out_columns; ++column) store(out + column, 0.0f);
}

}  // namespace xrl
