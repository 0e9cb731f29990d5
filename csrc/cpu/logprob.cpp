#include "cpu/logprob.h"

#include "cpu/logprob_row.h"
#include "team.h"

namespace xrl::XRL_ISA {

template <typename T>
void logprob_statistics(const LogitRows<T>& logits, const ChosenTokens& tokens, const RowStatistics& out,
                        int num_threads) {
  for_ranges(logits.num_rows, num_threads, [&](const Range& range) {
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* x = logits.data + row * logits.row_stride;
      const SoftmaxSums sums = softmax_sums(x, logits.num_columns, tokens.inverse_temperature);
      out.maximum[row] = sums.maximum;
      out.sum_exp[row] = static_cast<float>(sums.sum_exp);
      out.sum_exp_shifted[row] = static_cast<float>(sums.sum_exp_shifted);
      out.target[row] =
          shifted_target(x, logits.num_columns, column_of(tokens.ids[row], tokens.vocab_start), sums.maximum,
                         tokens.inverse_temperature);
    }
  });
}

template <typename T>
void logprob_gradient(const LogitRows<T>& logits, const ChosenTokens& tokens, const GradientRows& rows,
                      const OutputRows<T>& out, int num_threads) {
  for_ranges(logits.num_rows, num_threads, [&](const Range& range) {
    for (int64_t row = range.first; row < range.last; ++row) {
      const RowGradient gradient{rows.maximum[row], rows.log_sum[row], rows.entropy[row],
                                 rows.grad_logprob[row] * tokens.inverse_temperature,
                                 rows.grad_entropy ? rows.grad_entropy[row] * tokens.inverse_temperature : 0.0f};
      write_gradient(logits.data + row * logits.row_stride, logits.num_columns,
                     column_of(tokens.ids[row], tokens.vocab_start), tokens.inverse_temperature, gradient,
                     out.data + row * out.row_stride, out.num_columns);
    }
  });
}

#define XRL_INSTANTIATE(T)                                                                                          \
  template void logprob_statistics<T>(const LogitRows<T>&, const ChosenTokens&, const RowStatistics&, int);         \
  template void logprob_gradient<T>(const LogitRows<T>&, const ChosenTokens&, const GradientRows&,                  \
                                    const OutputRows<T>&, int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
