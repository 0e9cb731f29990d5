// Launcher of the GRPO loss in one pass over the logits; returns before the device is done.
#pragma once

#include "cpu/grpo_loss.h"
#include "cuda/launch.h"
#include "cuda/logprob.h"

namespace xrl::cuda {

// Log-prob, entropy, loss and gradient of each row, whose logits are read once and whose gradient is written once.
// `gradient` may be the logits, or have no data where none is wanted; it is multiplied by `factor`. Masked rows are not
// read, and hold 0 everywhere.
//
// Returns false, with nothing done, where it cannot: a device before sm_90, rows longer than the shared memory of a
// cluster, or rows that do not begin at multiples of 16 bytes.
template <typename T>
bool grpo_cluster(const LogitRows<T>& logits, const ChosenTokens& tokens, const GrpoInputs& inputs,
                  const GrpoRowParams& params, float factor, const OutputRows<T>& gradient,
                  const SinglePassOutputs& out, Stream stream);

}  // namespace xrl::cuda
