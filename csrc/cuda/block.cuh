// Sums and maxima over the threads of a block, in an order that never changes.
#pragma once

namespace xrl::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// A value of each warp, on its way to all threads. May be used again after a __syncthreads() that follows `values`.
struct WarpValues {
  float of_warp[kWarps];

  __device__ __forceinline__ void put(float value) {
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  }

  __device__ __forceinline__ float max() const {
    float found = of_warp[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) found = fmaxf(found, of_warp[warp]);
    return found;
  }

  __device__ __forceinline__ float sum() const {
    float total = of_warp[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total += of_warp[warp];
    return total;
  }
};

}  // namespace xrl::cuda
