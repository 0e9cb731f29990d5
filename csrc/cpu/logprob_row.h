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
// Columns that stay in the L1 cache between the search for their maximum and their sum.
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

static inline float exp2_one(float t) { return exp2_lanes(hold_exponent(all_lanes(t)))[0]; }

// The last columns of a row, fewer than a register holds; the rest of the register is filled with -inf.
template <typename T>
static inline Lanes load_tail(const T* place, int64_t count) {
  Lanes x = all_lanes(-std::numeric_limits<float>::infinity());
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = load(place[lane]);
  return x;
}

static inline Lanes larger(Lanes a, Lanes b) { return b > a ? b : a; }

// A block's exponentials, summed. `scale` is log2(e) / temperature. Without a name, as the linker would merge members.
namespace {
struct BlockSums {
  Lanes exp{};
  Lanes shifted{};

  inline void add(Lanes logits, float maximum, float scale) {
    const Lanes t = hold_exponent((logits - maximum) * scale);
    const Lanes e = exp2_lanes(t);
    exp += e;
    shifted += e * t;
  }
};
}  // namespace

// Sums over a row, read once: block by block, and what was summed is scaled down when a block has a larger maximum.
template <typename T>
static inline SoftmaxSums softmax_sums(const T* x, int64_t num_columns, float inverse_temperature) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const float scale = inverse_temperature * kLog2E;
  float highest = kNone;  // of the raw logits
  double sum_exp = 0.0;
  double sum_shifted = 0.0;  // in units of log2
  for (int64_t start = 0; start < num_columns; start += kBlockColumns) {
    const int64_t count = num_columns - start < kBlockColumns ? num_columns - start : kBlockColumns;
    const int64_t whole = count - count % (4 * kLanes);
    const T* block = x + start;
    Lanes m0 = all_lanes(kNone), m1 = m0, m2 = m0, m3 = m0;
    for (int64_t column = 0; column < whole; column += 4 * kLanes) {
      Lanes logits[4];
      load_four(block + column, logits);
      m0 = larger(m0, logits[0]);
      m1 = larger(m1, logits[1]);
      m2 = larger(m2, logits[2]);
      m3 = larger(m3, logits[3]);
    }
    float block_highest = highest_lane(larger(larger(m0, m1), larger(m2, m3)));
    for (int64_t column = whole; column < count; ++column) {
      const float value = load(block[column]);
      block_highest = value > block_highest ? value : block_highest;
    }
    if (block_highest > highest) {
      if (highest != kNone) {
        const double shift = (static_cast<double>(highest) - block_highest) * scale;
        const double factor = exp2_one(static_cast<float>(shift));
        // exp(s + d) * (s + d) = exp(d) * (exp(s) * s + exp(s) * d); where exp(d) is 0, so is all of it.
        sum_shifted = factor == 0.0 ? 0.0 : factor * (sum_shifted + sum_exp * shift);
        sum_exp *= factor;
      }
      highest = block_highest;
    }
    // A block of nothing but -inf so far has no maximum to subtract: 0 will do, its exponentials are 0.
    const float maximum = highest == kNone ? 0.0f : highest;
    BlockSums a, b, c, d;
    for (int64_t column = 0; column < whole; column += 4 * kLanes) {
      Lanes logits[4];
      load_four(block + column, logits);
      a.add(logits[0], maximum, scale);
      b.add(logits[1], maximum, scale);
      c.add(logits[2], maximum, scale);
      d.add(logits[3], maximum, scale);
    }
    for (int64_t column = whole; column < count; column += kLanes) {
      const int64_t rest = count - column;
      a.add(rest < kLanes ? load_tail(block + column, rest) : load_lanes(block + column), maximum, scale);
    }
    sum_exp += sum_lanes((a.exp + b.exp) + (c.exp + d.exp));
    sum_shifted += sum_lanes((a.shifted + b.shifted) + (c.shifted + d.shifted));
  }
  return {highest, sum_exp, sum_shifted * kLn2};
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
static inline void write_lanes(float* place, Lanes x) {
#if defined(__AVX512F__)
  if (kStream) return _mm512_stream_ps(place, (__m512)x);
#elif defined(__AVX__)
  if (kStream) return _mm256_stream_ps(place, (__m256)x);
#endif
  store_lanes(place, x);
}

template <bool kStream>
static inline void write_lanes(bfloat16* place, Lanes x) {
  store_lanes(place, x);
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
    const Lanes a = gradient_lanes<kEntropy>(load_lanes(x + column), scale, row);
    const Lanes b = gradient_lanes<kEntropy>(load_lanes(x + column + kLanes), scale, row);
    write_lanes<kStream>(out + column, a);
    write_lanes<kStream>(out + column + kLanes, b);
  }
  while (column < num_columns) one(column++);
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
