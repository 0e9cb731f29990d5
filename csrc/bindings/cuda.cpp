// The CUDA kernels, under names that begin with cuda_. Tensors and the stream come in as addresses; the caller has made
// the tensors' device the current one.
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "address.h"
#include "bindings/bindings.h"
#include "check.h"
#include "cuda/grpo_cluster.h"
#include "cuda/grpo_rows.h"
#include "cuda/logprob.h"
#include "grpo_params.h"

namespace py = pybind11;

namespace {

using py::arg;
using xrl::Address;
using xrl::at;

// The kernels count columns in 32 bits, and may look some thousands ahead.
constexpr int64_t kMaxColumns = int64_t{1} << 30;

void check_rows(int64_t num_rows, int64_t num_columns, int64_t row_stride) {
  xrl::check(num_rows >= 0 && num_columns >= 0, "num_rows and num_columns must be >= 0");
  xrl::check(num_columns <= kMaxColumns, "num_columns must be <= 2^30, got " + std::to_string(num_columns));
  xrl::check(row_stride >= num_columns || num_rows <= 1, "row_stride must be >= num_columns");
}

template <typename T>
void logprob_statistics(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                        bool ids_are_64_bit, int64_t vocab_start, float inverse_temperature, Address statistics,
                        Address stream) {
  check_rows(num_rows, num_columns, row_stride);
  float* out = at<float>(statistics);
  xrl::cuda::logprob_statistics(
      xrl::LogitRows<T>{at<const T>(logits), num_rows, num_columns, row_stride},
      xrl::cuda::ChosenTokens{at<const void>(token_ids), ids_are_64_bit, vocab_start, inverse_temperature},
      xrl::RowStatistics{out, out + num_rows, out + 2 * num_rows, out + 3 * num_rows}, at<CUstream_st>(stream));
}

template <typename T>
void logprob_gradient(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                      bool ids_are_64_bit, int64_t vocab_start, float inverse_temperature, Address maximum,
                      Address log_sum, Address entropy, Address grad_logprob, Address grad_entropy, Address out,
                      int64_t out_stride, int64_t num_out_columns, Address stream) {
  check_rows(num_rows, num_columns, row_stride);
  check_rows(num_rows, num_out_columns, out_stride);
  xrl::check(num_out_columns >= num_columns, "num_out_columns must be >= num_columns");
  xrl::cuda::logprob_gradient(
      xrl::LogitRows<T>{at<const T>(logits), num_rows, num_columns, row_stride},
      xrl::cuda::ChosenTokens{at<const void>(token_ids), ids_are_64_bit, vocab_start, inverse_temperature},
      xrl::GradientRows{at<const float>(maximum), at<const float>(log_sum), at<const float>(entropy),
                        at<const float>(grad_logprob), at<const float>(grad_entropy)},
      xrl::OutputRows<T>{at<T>(out), out_stride, num_out_columns}, at<CUstream_st>(stream));
}

void grpo_rows(Address logprob, Address entropy, Address old_logprobs, Address rollout_logprobs,
               Address reference_logprobs, Address advantages, Address shares, int64_t num_rows,
               const xrl::GrpoParamsTuple& params, Address out, Address stream) {
  xrl::check(num_rows >= 0, "num_rows must be >= 0");
  xrl::cuda::grpo_rows(at<const float>(logprob), at<const float>(entropy),
                       xrl::GrpoInputs{at<const float>(old_logprobs), at<const float>(rollout_logprobs),
                                       at<const float>(reference_logprobs), at<const float>(advantages),
                                       at<const float>(shares)},
                       xrl::grpo_params(params), xrl::GrpoOutputs{at<float>(out), num_rows}, at<CUstream_st>(stream));
}

// False, with nothing done, where the rows or the device do not allow it. No address for `gradient`: none is wanted.
template <typename T>
bool grpo_single_pass(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                      bool ids_are_64_bit, int64_t vocab_start, float inverse_temperature, Address old_logprobs,
                      Address rollout_logprobs, Address reference_logprobs, Address advantages, Address shares,
                      const xrl::GrpoParamsTuple& params, float factor, Address gradient, int64_t gradient_stride,
                      int64_t num_gradient_columns, Address out, Address stream) {
  check_rows(num_rows, num_columns, row_stride);
  if (gradient != 0) {
    check_rows(num_rows, num_gradient_columns, gradient_stride);
    xrl::check(num_gradient_columns >= num_columns, "num_gradient_columns must be >= num_columns");
  }
  return xrl::cuda::grpo_cluster(
      xrl::LogitRows<T>{at<const T>(logits), num_rows, num_columns, row_stride},
      xrl::cuda::ChosenTokens{at<const void>(token_ids), ids_are_64_bit, vocab_start, inverse_temperature},
      xrl::GrpoInputs{at<const float>(old_logprobs), at<const float>(rollout_logprobs),
                      at<const float>(reference_logprobs), at<const float>(advantages), at<const float>(shares)},
      xrl::grpo_params(params), factor, xrl::OutputRows<T>{at<T>(gradient), gradient_stride, num_gradient_columns},
      xrl::SinglePassOutputs{at<float>(out), num_rows}, at<CUstream_st>(stream));
}

// XRL_CUDA_ARCHITECTURES is a list such as "sm_90,compute_90", from CMake.
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream list(XRL_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

// Every kernel under its name and the number format's.
template <typename T>
void bind(py::module_& module, const std::string& suffix) {
  module.def(("cuda_logprob_statistics" + suffix).c_str(), &logprob_statistics<T>, arg("logits"), arg("num_rows"),
             arg("num_columns"), arg("row_stride"), arg("token_ids"), arg("ids_are_64_bit"), arg("vocab_start"),
             arg("inverse_temperature"), arg("statistics"), arg("stream"));
  module.def(("cuda_logprob_gradient" + suffix).c_str(), &logprob_gradient<T>, arg("logits"), arg("num_rows"),
             arg("num_columns"), arg("row_stride"), arg("token_ids"), arg("ids_are_64_bit"), arg("vocab_start"),
             arg("inverse_temperature"), arg("maximum"), arg("log_sum"), arg("entropy"), arg("grad_logprob"),
             arg("grad_entropy"), arg("out"), arg("out_stride"), arg("num_out_columns"), arg("stream"));
  module.def(("cuda_grpo_single_pass" + suffix).c_str(), &grpo_single_pass<T>, arg("logits"), arg("num_rows"),
             arg("num_columns"), arg("row_stride"), arg("token_ids"), arg("ids_are_64_bit"), arg("vocab_start"),
             arg("inverse_temperature"), arg("old_logprobs"), arg("rollout_logprobs"), arg("reference_logprobs"),
             arg("advantages"), arg("shares"), arg("settings"), arg("factor"), arg("gradient"), arg("gradient_stride"),
             arg("num_gradient_columns"), arg("out"), arg("stream"));
}

}  // namespace

void xrl::bind_cuda(py::module_& module) {
  module.def("cuda_built", [] { return true; });
  module.def("cuda_architectures", &architectures);
  module.def("cuda_why_not", &xrl::cuda::why_not, "Why the CUDA kernels cannot run on the current device, or ''.");
  bind<float>(module, "_f32");
  bind<xrl::cuda::Bfloat16>(module, "_bf16");
  module.def("cuda_grpo_rows", &grpo_rows, arg("logprob"), arg("entropy"), arg("old_logprobs"), arg("rollout_logprobs"),
             arg("reference_logprobs"), arg("advantages"), arg("shares"), arg("num_rows"), arg("settings"), arg("out"),
             arg("stream"));
}
