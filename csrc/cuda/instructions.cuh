// Single instructions that C++ has no name for; sm_80 and later have them all, but for those at the end.
#pragma once

#include <cstdint>

namespace xrl::cuda {

// 2^x to 2^-22; 0 below 2^-126, NaN for NaN. exp2f would add three instructions to keep subnormal results.
static __device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, NaN if either is; fmaxf would return the other.
static __device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The larger ones of two pairs of bf16; of a number and NaN the number.
static __device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Two floats as a pair of bf16, rounded to nearest even, the first in the low half.
static __device__ __forceinline__ uint32_t pair_of(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

#if __CUDA_ARCH__ >= 900

static __device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Counts bytes as they arrive in a block's shared memory. Used again and again: each use is a phase, 0, 1, 0, ...
struct BytesBarrier {
  uint64_t state;

  // By one thread; others may use it after a __syncthreads().
  __device__ __forceinline__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
    // Copies see memory in another way than threads do.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  // Starts to copy to shared memory; by one thread. Both places and num_bytes are multiples of 16.
  __device__ __forceinline__ void copy(void* to, const void* from, uint32_t num_bytes) {
    // What threads did with the memory before comes before the copy.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(num_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(num_bytes), "r"(shared_address(&state))
                 : "memory");
  }

  // Until all bytes of this phase are there.
  __device__ __forceinline__ void wait(uint32_t phase) {
    uint32_t is_done = 0;
    while (!is_done) {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}\n"
          : "=r"(is_done)
          : "r"(shared_address(&state)), "r"(phase)
          : "memory");
    }
  }
};

#endif

}  // namespace xrl::cuda
