#include "cpu/logprob.h"

#include <algorithm>
#include <limits>

#include "cpu/vector_math.h"

namespace xrl::XRL_ISA {
namespace {

// Sums run in fp32 within a block and in fp64 across blocks: 150,000 columns lose no digits.
constexpr int64_t kBlock = 2048;

}  // namespace

template <typename T>
void logprob_statistics(const LogitRows<T>& logits, const int64_t* token_ids, int64_t vocab_start,
                        float inverse_temperature, const RowStatistics& out, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t row = 0; row < logits.num_rows; ++row) {
    const T* x = logits.data + row * logits.row_stride;
    float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
    for (int64_t column = 0; column < logits.num_columns; ++column) {
      maximum = std::max(maximum, load(x[column]));
    }
    maximum *= inverse_temperature;
    double sum_exp = 0.0;
    double sum_exp_shifted = 0.0;
    for (int64_t start = 0; start < logits.num_columns; start += kBlock) {
      const int64_t stop = std::min(start + kBlock, logits.num_columns);
      float block_exp = 0.0f;
      float block_shifted = 0.0f;
#pragma omp simd reduction(+ : block_exp, block_shifted)
      for (int64_t column = start; column < stop; ++column) {
        const float s = load(x[column]) * inverse_temperature - maximum;
        const float e = exp_nonpositive(s);
        block_exp += e;
        // -inf has probability 0 and adds nothing; 0 * -inf would be NaN.
        block_shifted += e * (s < -87.0f ? 0.0f : s);
      }
      sum_exp += block_exp;
      sum_exp_shifted += block_shifted;
    }
    const bool empty = maximum == -std::numeric_limits<float>::infinity();
    const int64_t target = token_ids[row] - vocab_start;
    out.maximum[row] = maximum;
    out.sum_exp[row] = empty ? 0.0f : static_cast<float>(sum_exp);
    out.sum_exp_shifted[row] = empty ? 0.0f : static_cast<float>(sum_exp_shifted);
    out.target[row] =
        target >= 0 && target < logits.num_columns ? load(x[target]) * inverse_temperature : 0.0f;
  }
}

template <typename T>
void logprob_backward(const LogitRows<T>& logits, const int64_t* token_ids, int64_t vocab_start,
                      float inverse_temperature, const float* logsumexp, const float* entropy,
                      const float* grad_logprob, const float* grad_entropy, T* grad_logits, int64_t grad_stride,
                      int64_t num_grad_columns, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t row = 0; row < logits.num_rows; ++row) {
    const T* x = logits.data + row * logits.row_stride;
    T* gradient = grad_logits + row * grad_stride;
    const float lse = logsumexp[row];
    const float on_logprob = grad_logprob[row] * inverse_temperature;
    const float on_entropy = grad_entropy[row] * inverse_temperature;
    const float row_entropy = entropy[row];
#pragma omp simd
    for (int64_t column = 0; column < logits.num_columns; ++column) {
      const float logp = load(x[column]) * inverse_temperature - lse;
      // A log-prob is at most 0 but for rounding.
      const float p = exp_nonpositive(logp > 0.0f ? 0.0f : logp);
      const float finite_logp = logp < -87.0f ? 0.0f : logp;
      store(gradient + column, -p * (on_logprob + on_entropy * (finite_logp + row_entropy)));
    }
    const int64_t target = token_ids[row] - vocab_start;
    if (target >= 0 && target < logits.num_columns) {
      const float logp = load(x[target]) * inverse_temperature - lse;
      const float p = exp_nonpositive(logp > 0.0f ? 0.0f : logp);
      const float finite_logp = logp < -87.0f ? 0.0f : logp;
      store(gradient + target, on_logprob * (1.0f - p) - on_entropy * p * (finite_logp + row_entropy));
    }
    for (int64_t column = logits.num_columns; column < num_grad_columns; ++column) {
      store(gradient + column, 0.0f);
    }
  }
}

#define XRL_INSTANTIATE(T)                                                                                           \
  template void logprob_statistics<T>(const LogitRows<T>&, const int64_t*, int64_t, float, const RowStatistics&,    \
                                      int);                                                                         \
  template void logprob_backward<T>(const LogitRows<T>&, const int64_t*, int64_t, float, const float*, const float*, \
                                    const float*, const float*, T*, int64_t, int64_t, int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
