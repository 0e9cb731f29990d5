// Launcher of the GRPO loss of chosen tokens; returns before the device is done.
#pragma once

#include "cpu/grpo_loss.h"
#include "cuda/launch.h"

namespace xrl::cuda {

void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,
               const GrpoOutputs& out, Stream stream);

}  // namespace xrl::cuda
