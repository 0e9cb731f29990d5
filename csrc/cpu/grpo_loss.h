// The GRPO loss of chosen tokens: alone, from log-probs, and together with the logits it comes from.
#pragma once

#include <cstdint>

#include "cpu/logprob.h"
#include "grpo_row.h"

namespace xrl {

// All [R] fp32; those that may be null say so.
struct GrpoInputs {
  const float* old_logprobs;        // null: the current ones, so that the ratio is 1
  const float* rollout_logprobs;    // null: the importance weight is 1
  const float* reference_logprobs;  // null: no KL
  const float* advantages;
  const float* weights;

  GrpoRow row(int64_t index, float logprob, float entropy, bool importance_from_current) const {
    const float old_logprob = old_logprobs ? old_logprobs[index] : logprob;
    const float rollout = rollout_logprobs ? rollout_logprobs[index] : importance_from_current ? logprob : old_logprob;
    return {logprob,           entropy, old_logprob, rollout, reference_logprobs ? reference_logprobs[index] : 0.0f,
            advantages[index], weights[index]};
  }
};

// [10, R], in the order of xrl/kernels/grpo_rows.py.
struct GrpoOutputs {
  float* data;
  int64_t num_rows;

  void write(int64_t index, const GrpoRowOut& row) const {
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
    for (int64_t output = 0; output < 10; ++output) data[output * num_rows + index] = values[output];
  }
};

}  // namespace xrl

#define XRL_DECLARE_GRPO_LOSS(ISA)                                                                                    \
  namespace xrl::ISA {                                                                                                \
  void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,   \
                 const GrpoOutputs& out);                                                                             \
  /* One pass over whole rows (no other shards): log-prob, loss, and the gradient in place while the row is cached. */ \
  /* `statistics` is [3, R]: log-prob, entropy, log-sum-exp. */                                                       \
  template <typename T>                                                                                               \
  void grpo_fused(const LogitRows<T>& logits, const ChosenTokens& tokens, const GrpoInputs& inputs,                   \
                  const GrpoRowParams& params, const GrpoOutputs& out, float* statistics,                             \
                  const OutputRows<T>& gradient, int num_threads);                                                    \
  }

XRL_DECLARE_GRPO_LOSS(scalar)
XRL_DECLARE_GRPO_LOSS(avx2)
XRL_DECLARE_GRPO_LOSS(avx512)
