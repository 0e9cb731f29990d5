// The softmax of a row of logits, as the threads of a block sum it and form its gradient.
//
// Exponentials are taken to the base 2, so that scaling by 1 / temperature and by log2(e) is one product. The maximum
// is subtracted before that, so that logits of any size keep their digits.
#pragma once

#include <cfloat>
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/logprob.h"
#include "cuda/packs.cuh"

namespace xrl::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// 2 to this is 0 in fp32, and 0 times this is 0, where 0 times -inf would be NaN.
constexpr float kLowestExponent = -200.0f;
// 16-byte loads that a thread has on their way at a time.
constexpr int kPacksInFlight = 4;

static __device__ __forceinline__ float hold_exponent(float t) { return max_or_nan(t, kLowestExponent); }

// The token's column on this shard, -1 where another shard holds it.
static __device__ __forceinline__ int target_column(const ChosenTokens& tokens, int64_t row, int64_t num_columns) {
  const int64_t id = tokens.is_64_bit ? static_cast<const int64_t*>(tokens.ids)[row]
                                      : static_cast<const int32_t*>(tokens.ids)[row];
  const int64_t column = id - tokens.vocab_start;
  return column >= 0 && column < num_columns ? static_cast<int>(column) : -1;
}

// Logits in global memory, each read once.
template <typename T>
struct FromGlobal {
  using Type = T;
  const T* data;

  __device__ __forceinline__ Pack<T> pack(int column) const { return load_pack(data + column); }
};

// What a thread has summed so far, with t = (logit - maximum) * scale.
struct Sums {
  float maximum = -FLT_MAX;  // finite, so that -inf - maximum is never NaN; nothing but -inf leaves exp at 0
  float exp = 0.0f;          // sum of 2^t
  float shifted = 0.0f;      // sum of 2^t * t

  __device__ __forceinline__ void raise_maximum(float to, float scale) {
    const float raised = fmaxf(maximum, to);
    const float change = hold_exponent((maximum - raised) * scale);
    const float factor = exp2_fast(change);
    // 2^(t + c) * (t + c) = 2^c * (2^t * t + 2^t * c)
    shifted = factor * fmaf(exp, change, shifted);
    exp *= factor;
    maximum = raised;
  }

  __device__ __forceinline__ void add(float logit, float scale) {
    const float t = hold_exponent((logit - maximum) * scale);
    const float power = exp2_fast(t);
    exp += power;
    shifted = fmaf(power, t, shifted);
  }
};

template <typename T>
static __device__ __forceinline__ void add_packs(Sums& sums, const Pack<T> (&packs)[kPacksInFlight], float scale) {
  sums.raise_maximum(highest(packs), scale);
  // Summed apart from what came before: short sums round less.
  Sums step;
  step.maximum = sums.maximum;
#pragma unroll
  for (int pack = 0; pack < kPacksInFlight; ++pack) {
    float x[kPackColumns<T>];
    packs[pack].unpack(x);
#pragma unroll
    for (int column = 0; column < kPackColumns<T>; ++column) step.add(x[column], scale);
  }
  sums.exp += step.exp;
  sums.shifted += step.shifted;
}

// The part of a row's sums that falls to this thread.
template <typename Source>
static __device__ __forceinline__ Sums thread_sums(const Source& x, int num_columns, float scale) {
  using T = typename Source::Type;
  const RowParts parts = row_parts<T>(phase(x.data), num_columns);
  Sums sums;
  for (int first = threadIdx.x; first < parts.num_packs; first += kPacksInFlight * kThreads) {
    Pack<T> loaded[kPacksInFlight];
#pragma unroll
    for (int pack = 0; pack < kPacksInFlight; ++pack) {
      const int index = first + pack * kThreads;
      loaded[pack] = index < parts.num_packs ? x.pack(parts.head + index * kPackColumns<T>) : Pack<T>::minus_infinity();
    }
    add_packs(sums, loaded, scale);
  }
  // Head and tail have fewer columns than a pack, so threads of the first warp take one of each.
  const int edges[] = {static_cast<int>(threadIdx.x), parts.tail_start + static_cast<int>(threadIdx.x)};
  const int ends[] = {parts.head, num_columns};
#pragma unroll
  for (int edge = 0; edge < 2; ++edge) {
    if (edges[edge] < ends[edge]) {
      const float logit = load(x.data + edges[edge]);
      sums.raise_maximum(logit, scale);
      sums.add(logit, scale);
    }
  }
  return sums;
}

// The gradient of a row's logits: -p_v * (on_logprob + on_entropy * (logp_v + entropy)), on_logprob more at the
// target; both are divided by the temperature already.
struct RowSlopes {
  float maximum;
  float log_sum;
  float entropy;
  float on_logprob;
  float on_entropy;
  float inverse_temperature;
  int target;  // column, -1: none

  // As the loop over the columns takes them: -2^t * (level + tilt * t)
  float scale;
  float log2_sum;
  float level;
  float tilt;

  // `grad_logprob` and `grad_entropy` are the loss's slopes by the row's log-prob and entropy.
  __device__ __forceinline__ RowSlopes(float maximum, float log_sum, float entropy, float grad_logprob,
                                       float grad_entropy, float inverse_temperature, int target)
      : maximum(maximum),
        log_sum(log_sum),
        entropy(entropy),
        on_logprob(grad_logprob * inverse_temperature),
        on_entropy(grad_entropy * inverse_temperature),
        inverse_temperature(inverse_temperature),
        target(target),
        scale(inverse_temperature * kLog2E),
        log2_sum(log_sum * kLog2E),
        // An entropy that does not count may be anything.
        level(on_entropy == 0.0f ? on_logprob : fmaf(on_entropy, entropy, on_logprob)),
        tilt(on_entropy * kLn2) {}

  __device__ __forceinline__ bool are_zero() const { return on_logprob == 0.0f && on_entropy == 0.0f; }

  __device__ __forceinline__ float off_target(float logit) const {
    const float t = hold_exponent(fmaf(logit - maximum, scale, -log2_sum));
    return -exp2_fast(t) * fmaf(tilt, t, level);
  }

  // 1 - p takes the place of -p; expm1 keeps its digits where p is nearly 1.
  __device__ __forceinline__ float on_target(float logit) const {
    float logp = fmaf(logit - maximum, inverse_temperature, -log_sum);
    logp = logp > 0.0f ? 0.0f : logp;  // lets NaN pass
    const float p = expf(logp);
    const float from_entropy = on_entropy == 0.0f || p == 0.0f ? 0.0f : on_entropy * p * (logp + entropy);
    return -on_logprob * expm1f(logp) - from_entropy;
  }

  __device__ __forceinline__ float at(float logit, int column) const {
    return column == target ? on_target(logit) : off_target(logit);
  }
};

template <typename T>
static __device__ __forceinline__ Pack<T> gradient_pack(const Pack<T>& logits, int column, const RowSlopes& slopes) {
  float x[kPackColumns<T>];
  float gradient[kPackColumns<T>];
  logits.unpack(x);
#pragma unroll
  for (int place = 0; place < kPackColumns<T>; ++place) gradient[place] = slopes.off_target(x[place]);
  // One thread of the row comes here. Compared with, not indexed: an index would move the arrays to local memory.
  const int target = slopes.target - column;
  if (target >= 0 && target < kPackColumns<T>) {
    float logit = 0.0f;
#pragma unroll
    for (int place = 0; place < kPackColumns<T>; ++place) logit = place == target ? x[place] : logit;
    const float on_target = slopes.on_target(logit);
#pragma unroll
    for (int place = 0; place < kPackColumns<T>; ++place) {
      gradient[place] = place == target ? on_target : gradient[place];
    }
  }
  return Pack<T>::of(gradient);
}

// Every column is read and written by one thread, in this order, so `out` may be where `x` is.
template <typename Source>
static __device__ __forceinline__ void write_gradient(const Source& x, int num_columns, const RowSlopes& slopes,
                                                      typename Source::Type* out) {
  using T = typename Source::Type;
  const RowParts parts = row_parts<T>(phase(x.data) == phase(out) ? phase(x.data) : -1, num_columns);
  for (int first = threadIdx.x; first < parts.num_packs; first += kPacksInFlight * kThreads) {
    Pack<T> loaded[kPacksInFlight];
#pragma unroll
    for (int pack = 0; pack < kPacksInFlight; ++pack) {
      const int column = parts.head + (first + pack * kThreads) * kPackColumns<T>;
      loaded[pack] = column < parts.tail_start ? x.pack(column) : Pack<T>{};
    }
#pragma unroll
    for (int pack = 0; pack < kPacksInFlight; ++pack) {
      const int column = parts.head + (first + pack * kThreads) * kPackColumns<T>;
      if (column < parts.tail_start) store_pack(out + column, gradient_pack(loaded[pack], column, slopes));
    }
  }
  for (int column = threadIdx.x; column < parts.head; column += kThreads) {
    store(out + column, slopes.at(load(x.data + column), column));
  }
  const int column = parts.tail_start + static_cast<int>(threadIdx.x);
  if (column < num_columns) store(out + column, slopes.at(load(x.data + column), column));
}

template <typename T>
static __device__ __forceinline__ void write_zeros(T* out, int num_columns) {
  const RowParts parts = row_parts<T>(phase(out), num_columns);
  for (int pack = threadIdx.x; pack < parts.num_packs; pack += kThreads) {
    store_pack(out + parts.head + pack * kPackColumns<T>, Pack<T>{});
  }
  const int thread = threadIdx.x;
  if (thread < parts.head) store(out + thread, 0.0f);
  if (parts.tail_start + thread < num_columns) store(out + parts.tail_start + thread, 0.0f);
}

}  // namespace xrl::cuda
