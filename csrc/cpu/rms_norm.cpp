#include "cpu/rms_norm.h"

#include "cpu/inverse_rms.h"
#include "team.h"

namespace xrl::XRL_ISA {

template <typename T>
void rms_norm(const T* x, const T* weight, float eps, int64_t num_rows, int64_t size, T* out, int num_threads) {
  for_ranges(num_rows, num_threads, [&](const Range& range) {
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = x + row * size;
      T* y = out + row * size;
      const float scale = inverse_rms(in, size, eps);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) store(y + i, load(weight[i]) * rounded_to(in, load(in[i]) * scale));
    }
  });
}

template void rms_norm<float>(const float*, const float*, float, int64_t, int64_t, float*, int);
template void rms_norm<bfloat16>(const bfloat16*, const bfloat16*, float, int64_t, int64_t, bfloat16*, int);

}  // namespace xrl::XRL_ISA
