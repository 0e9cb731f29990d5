#include "cpu/grpo_loss.h"

#include <cmath>
#include <limits>

#include "cpu/logprob_row.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

GrpoRow read(const GrpoInputs& inputs, int64_t index, float logprob, float entropy, bool importance_from_current) {
  const float old_logprob = inputs.old_logprobs ? inputs.old_logprobs[index] : logprob;
  const float numerator = importance_from_current ? logprob : old_logprob;
  return {logprob,
          entropy,
          old_logprob,
          inputs.rollout_logprobs ? inputs.rollout_logprobs[index] : numerator,
          inputs.reference_logprobs ? inputs.reference_logprobs[index] : 0.0f,
          inputs.advantages[index],
          inputs.shares[index]};
}

void write(const GrpoOutputs& out, int64_t index, const GrpoRowOut& row) {
  const float values[] = {row.token_loss,
                          row.grad_logprob,
                          row.grad_entropy,
                          row.ratio,
                          row.kl,
                          row.importance,
                          row.clipped_low ? 1.0f : 0.0f,
                          row.clipped_high ? 1.0f : 0.0f,
                          row.clipped_dual ? 1.0f : 0.0f,
                          row.importance_bounded ? 1.0f : 0.0f};
  for (int64_t output = 0; output < 10; ++output) out.data[output * out.num_rows + index] = values[output];
}

}  // namespace

// A row's log-prob, entropy, loss and gradient while it is in the cache: from memory it is read once. Masked rows are
// not read at all. `gradient` may be the logits, or have no data where none is wanted; it is multiplied by `factor`.
template <typename T>
void grpo_single_pass(const LogitRows<T>& logits, const ChosenTokens& tokens, const GrpoInputs& inputs,
                      const GrpoRowParams& params, float factor, const OutputRows<T>& gradient,
                      const SinglePassOutputs& out, int num_threads) {
  const GrpoOutputs row_outputs{out.data + 2 * out.num_rows, out.num_rows};
  const float slope_factor = factor * tokens.inverse_temperature;
  for_ranges(logits.num_rows, num_threads, [&](const Range& range) {
    for (int64_t index = range.first; index < range.last; ++index) {
      const T* x = logits.data + index * logits.row_stride;
      const int64_t target = column_of(tokens.ids[index], tokens.vocab_start);
      RowGradient slopes{};
      GrpoRowOut values{};
      float logprob = 0.0f;
      float entropy = 0.0f;
      if (inputs.shares[index] != 0.0f) {
        const SoftmaxSums sums = softmax_sums(x, logits.num_columns, tokens.inverse_temperature);
        const float log_sum = std::log(static_cast<float>(sums.sum_exp));
        entropy = log_sum - static_cast<float>(sums.sum_exp_shifted / sums.sum_exp);
        logprob = std::numeric_limits<float>::quiet_NaN();
        if (target >= 0 && target < logits.num_columns) {
          logprob =
              shifted_target(x, logits.num_columns, target, sums.maximum, tokens.inverse_temperature) - log_sum;
        }
        values = grpo_token(read(inputs, index, logprob, entropy, params.importance_from_current), params);
        slopes = {sums.maximum, log_sum, entropy, values.grad_logprob * slope_factor,
                  params.entropy_coef == 0.0f ? 0.0f : values.grad_entropy * slope_factor};
      }
      out.data[index] = logprob;
      out.data[out.num_rows + index] = entropy;
      write(row_outputs, index, values);
      if (gradient.data != nullptr) {
        write_gradient(x, logits.num_columns, target, tokens.inverse_temperature, slopes,
                       gradient.data + index * gradient.row_stride, gradient.num_columns);
      }
    }
  });
}

#define XRL_INSTANTIATE(T)                                                                                            \
  template void grpo_single_pass<T>(const LogitRows<T>&, const ChosenTokens&, const GrpoInputs&, const GrpoRowParams&, \
                                    float, const OutputRows<T>&, const SinglePassOutputs&, int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,
               const GrpoOutputs& out) {
  for (int64_t index = 0; index < out.num_rows; ++index) {
    const GrpoRow row = read(inputs, index, logprob[index], entropy[index], params.importance_from_current);
    write(out, index, grpo_token(row, params));
  }
}

}  // namespace xrl::XRL_ISA
