#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace xrl::cuda {

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA launch of ") + kernel + " failed: " + cudaGetErrorString(error));
  }
}

}  // namespace xrl::cuda
