// What every CUDA launcher shares; no CUDA header, so that the bindings need none.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace xrl::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// A number format of 16 bits: sign, 8 bits of exponent, 7 of mantissa.
struct Bfloat16 {
  uint16_t bits;
};

// Throws std::runtime_error if the launch before it failed. What fails on the device later is reported by torch.
void check_launch(const char* kernel);

}  // namespace xrl::cuda
