// The GRPO loss of one token and its gradient, for every compiled backend: the maths of xrl/algorithms/token_terms.py.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define XRL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define XRL_HOST_DEVICE inline
#endif

namespace xrl {

enum class KlType { kNone, kK1, kK2, kK3 };
enum class ImportanceKind { kOff, kTruncate, kMask };

struct GrpoRowParams {
  float lowest_ratio;
  float highest_ratio;
  float lowest_importance;
  float highest_importance;
  float dual_clip;  // 0: off
  KlType kl_type;
  float kl_coef;
  float entropy_coef;
  ImportanceKind importance;
  bool importance_from_current;  // the weight's numerator is the current log-prob, not the old one
};

struct GrpoRow {
  float logprob;
  float entropy;
  float old_logprob;
  float rollout_logprob;  // the importance weight's numerator where there is none, which makes the weight 1
  float reference_logprob;
  float advantage;
  float share;  // of the token in the loss; 0 masks it, whatever else it holds
};

// The first three are multiplied by the token's share.
struct GrpoRowOut {
  float token_loss;
  float grad_logprob;
  float grad_entropy;
  float ratio;
  float kl;
  float importance;
  bool clipped_low;
  bool clipped_high;
  bool clipped_dual;
  bool importance_bounded;
};

namespace grpo_row {

// exp of more than these is clamped; see algorithms/clipped.py, importance.py and kl.py.
constexpr float kMaxLogRatio = 20.0f;
constexpr float kMaxLogKl = 10.0f;

// Like torch.clamp, these let NaN pass.
static XRL_HOST_DEVICE float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

struct Kl {
  float value;
  float slope;  // by logprob
};

static XRL_HOST_DEVICE Kl kl(KlType type, float logprob, float reference) {
  const float difference = logprob - reference;
  switch (type) {
    case KlType::kK1:
      return {difference, 1.0f};
    case KlType::kK2:
      return {0.5f * difference * difference, difference};
    case KlType::kK3: {
      const float log_ratio = -difference;
      const float excess = log_ratio > kMaxLogKl ? log_ratio - kMaxLogKl : 0.0f;
      const float capped = log_ratio - excess;
      // expm1 keeps the digits that exp(x) - 1 loses near 0.
      const float ratio_minus_1 = expm1f(capped);
      return {ratio_minus_1 - capped + excess * ratio_minus_1, -ratio_minus_1};
    }
    default:
      return {0.0f, 0.0f};
  }
}

}  // namespace grpo_row

static XRL_HOST_DEVICE GrpoRowOut grpo_token(const GrpoRow& row, const GrpoRowParams& params) {
  const float log_ratio = row.logprob - row.old_logprob;
  const float clamped = grpo_row::clamp(log_ratio, -grpo_row::kMaxLogRatio, grpo_row::kMaxLogRatio);
  const float ratio = expf(clamped);
  const float unbounded = -row.advantage * ratio;
  const float bounded = -row.advantage * grpo_row::clamp(ratio, params.lowest_ratio, params.highest_ratio);
  const bool binds = bounded > unbounded;
  float surrogate = binds ? bounded : unbounded;
  // Nothing flows through a bound that binds, nor through a log ratio beyond its clamp. On a tie of the two arguments
  // the ratio is within the bounds or the advantage is 0: the slope is that of `unbounded` in both cases.
  float slope = binds || clamped != log_ratio ? 0.0f : unbounded;
  const float ceiling = -row.advantage * params.dual_clip;
  const bool dual = params.dual_clip > 0.0f && row.advantage < 0.0f && surrogate > ceiling;
  if (dual) {
    surrogate = ceiling;
    slope = 0.0f;
  }

  const float actor_logprob = params.importance_from_current ? row.logprob : row.old_logprob;
  const float log_weight = actor_logprob - row.rollout_logprob;
  const float raw = expf(grpo_row::clamp(log_weight, -grpo_row::kMaxLogRatio, grpo_row::kMaxLogRatio));
  float importance = 1.0f;
  bool outside = false;
  if (params.importance == ImportanceKind::kTruncate) {
    outside = raw > params.highest_importance;
    importance = outside ? params.highest_importance : raw;
  } else if (params.importance == ImportanceKind::kMask) {
    outside = raw > params.highest_importance || raw < params.lowest_importance;
    importance = outside ? 0.0f : raw;
  }

  const grpo_row::Kl kl = grpo_row::kl(params.kl_type, row.logprob, row.reference_logprob);
  float loss = importance * surrogate;
  float gradient = importance * slope;
  // Skipped, not multiplied by 0: what is off must not bring a NaN in.
  if (params.kl_coef != 0.0f && params.kl_type != KlType::kNone) {
    loss += params.kl_coef * kl.value;
    gradient += params.kl_coef * kl.slope;
  }
  if (params.entropy_coef != 0.0f) loss -= params.entropy_coef * row.entropy;

  const bool masked = row.share == 0.0f;
  return {masked ? 0.0f : row.share * loss,
          masked ? 0.0f : row.share * gradient,
          masked ? 0.0f : -row.share * params.entropy_coef,
          ratio,
          kl.value,
          raw,
          binds && row.advantage < 0.0f,
          binds && row.advantage > 0.0f,
          dual,
          outside};
}

}  // namespace xrl
