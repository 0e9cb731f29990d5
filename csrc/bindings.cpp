// Names and argument checks only. Tensors come in as addresses, so that no torch header is needed and the module
// loads under any torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "check.h"
#include "cpu/logprob.h"
#include "cpu/vector_math.h"
#include "dispatch.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
xrl::LogitRows<T> rows(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride) {
  return {at<const T>(logits), num_rows, num_columns, row_stride};
}

void check_rows(int64_t num_rows, int64_t num_columns, int64_t row_stride, int num_threads) {
  xrl::check(num_rows >= 0 && num_columns >= 0, "num_rows and num_columns must be >= 0");
  xrl::check(row_stride >= num_columns || num_rows <= 1, "row_stride must be >= num_columns");
  xrl::check(num_threads >= 1, "num_threads must be >= 1, got " + std::to_string(num_threads));
}

template <typename T>
void logprob_statistics(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                        int64_t vocab_start, float inverse_temperature, Address maximum, Address sum_exp,
                        Address sum_exp_shifted, Address target, int num_threads) {
  check_rows(num_rows, num_columns, row_stride, num_threads);
  const xrl::RowStatistics out{at<float>(maximum), at<float>(sum_exp), at<float>(sum_exp_shifted), at<float>(target)};
  py::gil_scoped_release release;
  XRL_DISPATCH(logprob_statistics, rows<T>(logits, num_rows, num_columns, row_stride), at<const int64_t>(token_ids),
               vocab_start, inverse_temperature, out, num_threads);
}

template <typename T>
void logprob_backward(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                      int64_t vocab_start, float inverse_temperature, Address logsumexp, Address entropy,
                      Address grad_logprob, Address grad_entropy, Address grad_logits, int64_t grad_stride,
                      int64_t num_grad_columns, int num_threads) {
  check_rows(num_rows, num_columns, row_stride, num_threads);
  xrl::check(num_grad_columns >= num_columns, "num_grad_columns must be >= num_columns");
  py::gil_scoped_release release;
  XRL_DISPATCH(logprob_backward, rows<T>(logits, num_rows, num_columns, row_stride), at<const int64_t>(token_ids),
               vocab_start, inverse_temperature, at<const float>(logsumexp), at<const float>(entropy),
               at<const float>(grad_logprob), at<const float>(grad_entropy), at<T>(grad_logits), grad_stride,
               num_grad_columns, num_threads);
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
  module.def("logprob_statistics_f32", &logprob_statistics<float>);
  module.def("logprob_statistics_bf16", &logprob_statistics<xrl::bfloat16>);
  module.def("logprob_backward_f32", &logprob_backward<float>);
  module.def("logprob_backward_bf16", &logprob_backward<xrl::bfloat16>);
}
