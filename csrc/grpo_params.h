// The settings of the GRPO loss as they come from Python.
#pragma once

#include <tuple>

#include "grpo_row.h"

namespace xrl {

// What native_settings of xrl/kernels/head/grpo_rows.py makes: the fields of the struct below, in their order.
using GrpoParamsTuple = std::tuple<float, float, float, float, float, int, float, float, int, bool>;

inline GrpoRowParams grpo_params(const GrpoParamsTuple& values) {
  const auto& [lowest_ratio, highest_ratio, lowest_importance, highest_importance, dual_clip, kl_type, kl_coef,
               entropy_coef, importance, from_current] = values;
  return {lowest_ratio,
          highest_ratio,
          lowest_importance,
          highest_importance,
          dual_clip,
          static_cast<KlType>(kl_type),
          kl_coef,
          entropy_coef,
          static_cast<ImportanceKind>(importance),
          from_current};
}

}  // namespace xrl
