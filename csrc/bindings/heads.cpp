// Log-probs and the GRPO loss, from logits.
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "address.h"
#include "bindings/bindings.h"
#include "check.h"
#include "cpu/grpo_loss.h"
#include "cpu/huge_pages.h"
#include "cpu/logprob.h"
#include "cpu/vector_math.h"
#include "dispatch.h"
#include "grpo_params.h"

namespace py = pybind11;

namespace {

using py::arg;
using xrl::Address;
using xrl::at;

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
                        int64_t vocab_start, float inverse_temperature, Address statistics, int num_threads) {
  check_rows(num_rows, num_columns, row_stride, num_threads);
  float* out = at<float>(statistics);
  const xrl::RowStatistics rows_out{out, out + num_rows, out + 2 * num_rows, out + 3 * num_rows};
  const xrl::ChosenTokens tokens{at<const int64_t>(token_ids), vocab_start, inverse_temperature};
  py::gil_scoped_release release;
  XRL_DISPATCH(logprob_statistics, rows<T>(logits, num_rows, num_columns, row_stride), tokens, rows_out, num_threads);
}

template <typename T>
void logprob_gradient(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                      int64_t vocab_start, float inverse_temperature, Address maximum, Address log_sum,
                      Address entropy, Address grad_logprob, Address grad_entropy, Address out, int64_t out_stride,
                      int64_t num_out_columns, int num_threads) {
  check_rows(num_rows, num_columns, row_stride, num_threads);
  xrl::check(num_out_columns >= num_columns, "num_out_columns must be >= num_columns");
  const xrl::ChosenTokens tokens{at<const int64_t>(token_ids), vocab_start, inverse_temperature};
  const xrl::GradientRows gradients{at<const float>(maximum), at<const float>(log_sum), at<const float>(entropy),
                                    at<const float>(grad_logprob), at<const float>(grad_entropy)};
  const xrl::OutputRows<T> rows_out{at<T>(out), out_stride, num_out_columns};
  xrl::check(num_rows <= 1 || out_stride >= num_out_columns, "the rows of out must not overlap");
  py::gil_scoped_release release;
  if (out != logits) xrl::advise_huge_pages(at<void>(out), sizeof(T) * num_rows * out_stride);
  XRL_DISPATCH(logprob_gradient, rows<T>(logits, num_rows, num_columns, row_stride), tokens, gradients, rows_out,
               num_threads);
}

void grpo_rows(Address logprob, Address entropy, Address old_logprobs, Address rollout_logprobs,
               Address reference_logprobs, Address advantages, Address shares, int64_t num_rows,
               const xrl::GrpoParamsTuple& params, Address out) {
  const xrl::GrpoInputs inputs{at<const float>(old_logprobs), at<const float>(rollout_logprobs),
                               at<const float>(reference_logprobs), at<const float>(advantages),
                               at<const float>(shares)};
  py::gil_scoped_release release;
  XRL_DISPATCH(grpo_rows, at<const float>(logprob), at<const float>(entropy), inputs, xrl::grpo_params(params),
               xrl::GrpoOutputs{at<float>(out), num_rows});
}

template <typename T>
void grpo_single_pass(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                      int64_t vocab_start, float inverse_temperature, Address old_logprobs, Address rollout_logprobs,
                      Address reference_logprobs, Address advantages, Address shares,
                      const xrl::GrpoParamsTuple& params, float factor, Address gradient, int64_t gradient_stride,
                      int64_t num_gradient_columns, Address out, int num_threads) {
  check_rows(num_rows, num_columns, row_stride, num_threads);
  xrl::check(gradient == 0 || num_gradient_columns >= num_columns, "num_gradient_columns must be >= num_columns");
  xrl::check(num_rows <= 1 || gradient == 0 || gradient_stride >= num_gradient_columns,
             "the rows of gradient must not overlap");
  const xrl::ChosenTokens tokens{at<const int64_t>(token_ids), vocab_start, inverse_temperature};
  const xrl::GrpoInputs inputs{at<const float>(old_logprobs), at<const float>(rollout_logprobs),
                               at<const float>(reference_logprobs), at<const float>(advantages),
                               at<const float>(shares)};
  const xrl::OutputRows<T> gradient_out{at<T>(gradient), gradient_stride, num_gradient_columns};
  py::gil_scoped_release release;
  if (gradient != 0 && gradient != logits) {
    xrl::advise_huge_pages(at<void>(gradient), sizeof(T) * num_rows * gradient_stride);
  }
  XRL_DISPATCH(grpo_single_pass, rows<T>(logits, num_rows, num_columns, row_stride), tokens, inputs,
               xrl::grpo_params(params), factor, gradient_out, xrl::SinglePassOutputs{at<float>(out), num_rows},
               num_threads);
}

// Every kernel under its name and the number format's.
template <typename T>
void bind(py::module_& module, const std::string& suffix) {
  module.def(("logprob_statistics" + suffix).c_str(), &logprob_statistics<T>, arg("logits"), arg("num_rows"),
             arg("num_columns"), arg("row_stride"), arg("token_ids"), arg("vocab_start"), arg("inverse_temperature"),
             arg("statistics"), arg("num_threads"));
  module.def(("logprob_gradient" + suffix).c_str(), &logprob_gradient<T>, arg("logits"), arg("num_rows"),
             arg("num_columns"), arg("row_stride"), arg("token_ids"), arg("vocab_start"), arg("inverse_temperature"),
             arg("maximum"), arg("log_sum"), arg("entropy"), arg("grad_logprob"), arg("grad_entropy"), arg("out"),
             arg("out_stride"), arg("num_out_columns"), arg("num_threads"));
  module.def(("grpo_single_pass" + suffix).c_str(), &grpo_single_pass<T>, arg("logits"), arg("num_rows"),
             arg("num_columns"), arg("row_stride"), arg("token_ids"), arg("vocab_start"), arg("inverse_temperature"),
             arg("old_logprobs"), arg("rollout_logprobs"), arg("reference_logprobs"), arg("advantages"), arg("shares"),
             arg("settings"), arg("factor"), arg("gradient"), arg("gradient_stride"), arg("num_gradient_columns"),
             arg("out"), arg("num_threads"));
}

}  // namespace

void xrl::bind_heads(py::module_& module) {
  bind<float>(module, "_f32");
  bind<xrl::bfloat16>(module, "_bf16");
  module.def("grpo_rows", &grpo_rows, arg("logprob"), arg("entropy"), arg("old_logprobs"), arg("rollout_logprobs"),
             arg("reference_logprobs"), arg("advantages"), arg("shares"), arg("num_rows"), arg("settings"), arg("out"));
}
