#include "cpu/grpo_loss.h"

#include <cmath>

#include "cpu/logprob_row.h"

namespace xrl::XRL_ISA {

void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,
               const GrpoOutputs& out) {
  for (int64_t index = 0; index < out.num_rows; ++index) {
    const GrpoRow row = inputs.row(index, logprob[index], entropy[index], params.importance_from_current);
    out.write(index, grpo_token(row, params));
  }
}

template <typename T>
void grpo_fused(const LogitRows<T>& logits, const ChosenTokens& tokens, const GrpoInputs& inputs,
                const GrpoRowParams& params, const GrpoOutputs& out, float* statistics, const OutputRows<T>& gradient,
                int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 4)
  for (int64_t index = 0; index < logits.num_rows; ++index) {
    const T* x = logits.data + index * logits.row_stride;
    const int64_t target = tokens.ids[index] - tokens.vocab_start;
    const SoftmaxSums sums = softmax_sums(x, logits.num_columns, tokens.inverse_temperature);
    const float total = static_cast<float>(sums.sum_exp);
    const float log_sum = std::log(total);
    const float entropy = log_sum - static_cast<float>(sums.sum_exp_shifted) / total;
    const float logprob =
        shifted_target(x, logits.num_columns, target, sums.maximum, tokens.inverse_temperature) - log_sum;
    const GrpoRow row = inputs.row(index, logprob, entropy, params.importance_from_current);
    const GrpoRowOut result = grpo_token(row, params);
    out.write(index, result);
    statistics[index] = logprob;
    statistics[logits.num_rows + index] = entropy;
    statistics[2 * logits.num_rows + index] = sums.maximum * tokens.inverse_temperature + log_sum;
    if (gradient.data == nullptr) continue;
    const RowGradient slope{sums.maximum, log_sum, entropy, result.grad_logprob * tokens.inverse_temperature,
                            result.grad_entropy * tokens.inverse_temperature};
    write_gradient(x, logits.num_columns, target, tokens.inverse_temperature, slope,
                   gradient.data + index * gradient.row_stride, gradient.num_columns);
  }
}

#define XRL_INSTANTIATE(T)                                                                                       \
  template void grpo_fused<T>(const LogitRows<T>&, const ChosenTokens&, const GrpoInputs&, const GrpoRowParams&, \
                              const GrpoOutputs&, float*, const OutputRows<T>&, int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
