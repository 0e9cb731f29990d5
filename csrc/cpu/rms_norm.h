// y = x / sqrt(mean(x^2) + eps) * weight, row by row.
#pragma once

#include <cstdint>

#define XRL_DECLARE_RMS_NORM(ISA)                                                                                    \
  namespace xrl::ISA {                                                                                               \
  template <typename T>                                                                                              \
  void rms_norm(const T* x, const T* weight, float eps, int64_t num_rows, int64_t size, T* out, int num_threads);    \
  }

XRL_DECLARE_RMS_NORM(scalar)
XRL_DECLARE_RMS_NORM(avx2)
XRL_DECLARE_RMS_NORM(avx512)
