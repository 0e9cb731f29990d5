// Statistics of softmax(logits / temperature) and the gradient of the logits: a block of threads a row.
#include "cuda/logprob.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/softmax.cuh"

namespace xrl::cuda {
namespace {

// Blocks that share a multiprocessor: one loads while another computes. Leaves 64 registers to a thread.
constexpr int kBlocksTogether = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    statistics_kernel(LogitRows<T> logits, ChosenTokens tokens, RowStatistics out) {
  __shared__ WarpValues maxima, sums_exp, sums_shifted;
  const float scale = tokens.inverse_temperature * kLog2E;
  for (int64_t row = blockIdx.x; row < logits.num_rows; row += gridDim.x) {
    const T* x = logits.data + row * logits.row_stride;
    Sums sums = thread_sums(FromGlobal<T>{x}, static_cast<int>(logits.num_columns), scale);

    maxima.put(warp_max(sums.maximum));
    __syncthreads();
    sums.raise_maximum(maxima.max(), scale);
    sums_exp.put(warp_sum(sums.exp));
    sums_shifted.put(warp_sum(sums.shifted));
    __syncthreads();

    if (threadIdx.x == 0) {
      const float sum_exp = sums_exp.sum();
      const bool nothing = sum_exp == 0.0f;
      const int target = target_column(tokens, row, logits.num_columns);
      float shifted_target = 0.0f;
      if (target >= 0) {
        shifted_target = nothing ? kMinusInfinity : (load(x + target) - sums.maximum) * tokens.inverse_temperature;
      }
      out.maximum[row] = nothing ? kMinusInfinity : sums.maximum;
      out.sum_exp[row] = sum_exp;
      out.sum_exp_shifted[row] = sums_shifted.sum() * kLn2;
      out.target[row] = shifted_target;
    }
  }
}

__device__ __forceinline__ RowSlopes slopes_of(const GradientRows& rows, const ChosenTokens& tokens, int64_t row,
                                               int64_t num_columns) {
  const float on_entropy = rows.grad_entropy == nullptr ? 0.0f : rows.grad_entropy[row];
  return RowSlopes(rows.maximum[row], rows.log_sum[row], rows.entropy[row], rows.grad_logprob[row], on_entropy,
                   tokens.inverse_temperature, target_column(tokens, row, num_columns));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    gradient_kernel(LogitRows<T> logits, ChosenTokens tokens, GradientRows rows, OutputRows<T> out) {
  for (int64_t row = blockIdx.x; row < logits.num_rows; row += gridDim.x) {
    const RowSlopes slopes = slopes_of(rows, tokens, row, logits.num_columns);
    T* row_out = out.data + row * out.row_stride;
    int num_written = 0;
    if (!slopes.are_zero()) {
      num_written = static_cast<int>(logits.num_columns);
      write_gradient(FromGlobal<T>{logits.data + row * logits.row_stride}, num_written, slopes, row_out);
    }
    write_zeros(row_out + num_written, static_cast<int>(out.num_columns) - num_written);
  }
}

// The largest grid there is; kernels take the rows beyond it in further turns.
unsigned int grid(int64_t num_rows) { return static_cast<unsigned int>(std::min<int64_t>(num_rows, 0x7fffffff)); }

}  // namespace

template <typename T>
void logprob_statistics(const LogitRows<T>& logits, const ChosenTokens& tokens, const RowStatistics& out,
                        Stream stream) {
  if (logits.num_rows == 0) return;
  statistics_kernel<<<grid(logits.num_rows), kThreads, 0, stream>>>(logits, tokens, out);
  check_launch("logprob_statistics");
}

template <typename T>
void logprob_gradient(const LogitRows<T>& logits, const ChosenTokens& tokens, const GradientRows& rows,
                      const OutputRows<T>& out, Stream stream) {
  if (logits.num_rows == 0 || out.num_columns == 0) return;
  gradient_kernel<<<grid(logits.num_rows), kThreads, 0, stream>>>(logits, tokens, rows, out);
  check_launch("logprob_gradient");
}

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, statistics_kernel<float>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // takes the error back: it was a question
  return cudaGetErrorString(error);
}

#define XRL_INSTANTIATE(T)                                                                                           \
  template void logprob_statistics<T>(const LogitRows<T>&, const ChosenTokens&, const RowStatistics&, Stream);       \
  template void logprob_gradient<T>(const LogitRows<T>&, const ChosenTokens&, const GradientRows&,                   \
                                    const OutputRows<T>&, Stream);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(Bfloat16)

}  // namespace xrl::cuda
