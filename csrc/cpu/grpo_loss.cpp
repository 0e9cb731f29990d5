#include "cpu/grpo_loss.h"

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
          inputs.weights[index]};
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

void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,
               const GrpoOutputs& out) {
  for (int64_t index = 0; index < out.num_rows; ++index) {
    const GrpoRow row = read(inputs, index, logprob[index], entropy[index], params.importance_from_current);
    write(out, index, grpo_token(row, params));
  }
}

}  // namespace xrl::XRL_ISA
