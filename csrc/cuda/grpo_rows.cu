// The GRPO loss of chosen tokens: a thread a row.
#include "cuda/grpo_rows.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/grpo_token.cuh"

namespace xrl::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    grpo_rows_kernel(const float* logprob, const float* entropy, GrpoInputs inputs, GrpoRowParams params,
                     GrpoOutputs out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < out.num_rows; row += step) {
    write(out, row, grpo_token(read(inputs, row, logprob[row], entropy[row], params.importance_from_current), params));
  }
}

}  // namespace

void grpo_rows(const float* logprob, const float* entropy, const GrpoInputs& inputs, const GrpoRowParams& params,
               const GrpoOutputs& out, Stream stream) {
  if (out.num_rows == 0) return;
  // More blocks than any device runs at once; the kernel takes further rows in turns.
  const int64_t num_blocks = std::min<int64_t>((out.num_rows + kThreads - 1) / kThreads, 1 << 16);
  grpo_rows_kernel<<<static_cast<unsigned int>(num_blocks), kThreads, 0, stream>>>(logprob, entropy, inputs, params,
                                                                                  out);
  check_launch("grpo_rows");
}

}  // namespace xrl::cuda
