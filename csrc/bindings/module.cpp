// The module itself. Bindings are names and argument checks only. Tensors come in as addresses, so that no torch header
// is needed and the module loads under any torch.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "check.h"
#include "dispatch.h"
#include "team.h"

namespace py = pybind11;

namespace {

void set_num_threads(int count) {
  xrl::check(count >= 0 && count <= xrl::kMostThreads,
             "the number of threads must be in [0, " + std::to_string(xrl::kMostThreads) + "], got " +
                 std::to_string(count));
  xrl::set_num_threads(count);
}

const char* cpu_isa() {
  switch (xrl::isa()) {
    case xrl::Isa::kAvx512:
      return "avx512";
    case xrl::Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of xrl; call them through xrl.kernels, which checks shapes and types.";
  module.def("cpu_isa", &cpu_isa, "Instruction set the CPU kernels run with.");
  module.def("set_num_threads", &set_num_threads, py::arg("count"), "Threads that kernels of this process use.");
  module.def("num_threads", &xrl::num_threads, "What set_num_threads said, or 0.");
  xrl::bind_heads(module);
  xrl::bind_decode(module);
  xrl::bind_layers(module);
  xrl::bind_matmul(module);
  xrl::bind_weights(module);
#ifdef XRL_WITH_CUDA
  xrl::bind_cuda(module);
#else
  module.def("cuda_built", [] { return false; });
  module.def("cuda_architectures", [] { return std::vector<std::string>{}; });
#endif
}
