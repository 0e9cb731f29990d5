// The GRPO loss of chosen tokens, from their log-probs.
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
  const float* shares;  // of each token in the loss; 0 masks it
};

// [ROW_OUTPUTS, R], in the order of xrl/kernels/head/grpo_rows.py.
struct GrpoOutputs {
  float* data;
  int64_t num_rows;
};

// [SINGLE_PASS_OUTPUTS, R]: log-prob and entropy, then what GrpoOutputs holds.
struct SinglePassOutputs {
  float* data;
  int64_t num_rows;
};

}  // namespace xrl

#define XRL_DECLARE_GRPO_LOSS(ISA)                                                                                    \
  namespace xrl::ISA {                                                                                                \
  template <typename T>                                                                                               \
  void grpo_single_pass(const LogitRows<T>& logits, const ChosenTokens& tokens, const GrpoInputs& inputs,             \
                        const GrpoRowParams& params, float factor, const OutputRows<T>& gradient,                     \
                        const SinglePassOutputs& out, int num_threads);                                               \
  void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,   \
                 const GrpoOutputs& out);                                                                             \
  }

XRL_DECLARE_GRPO_LOSS(scalar)
XRL_DECLARE_GRPO_LOSS(avx2)
XRL_DECLARE_GRPO_LOSS(avx512)
