// One token's part of the GRPO loss, from global memory and back.
#pragma once

#include <cstdint>

#include "cuda/grpo_rows.h"

namespace xrl::cuda {

static __device__ __forceinline__ GrpoRow read(const GrpoInputs& inputs, int64_t row, float logprob,
                                               float entropy, bool importance_from_current) {
  const float old_logprob = inputs.old_logprobs ? inputs.old_logprobs[row] : logprob;
  const float numerator = importance_from_current ? logprob : old_logprob;
  return {logprob,
          entropy,
          old_logprob,
          inputs.rollout_logprobs ? inputs.rollout_logprobs[row] : numerator,
          inputs.reference_logprobs ? inputs.reference_logprobs[row] : 0.0f,
          inputs.advantages[row],
          inputs.shares[row]};
}

static __device__ __forceinline__ void write(const GrpoOutputs& out, int64_t row, const GrpoRowOut& values) {
  float* place = out.data + row;
  const auto put = [&](float value) {
    *place = value;
    place += out.num_rows;
  };
  put(values.token_loss);
  put(values.grad_logprob);
  put(values.grad_entropy);
  put(values.ratio);
  put(values.kl);
  put(values.importance);
  put(values.clipped_low ? 1.0f : 0.0f);
  put(values.clipped_high ? 1.0f : 0.0f);
  put(values.clipped_dual ? 1.0f : 0.0f);
  put(values.importance_bounded ? 1.0f : 0.0f);
}

}  // namespace xrl::cuda
