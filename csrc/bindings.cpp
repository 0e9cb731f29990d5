// Names and argument checks only. Tensors come in as addresses, so that no torch header is needed and the module
// loads under any torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "address.h"
#include "arguments.h"
#include "check.h"
#include "cpu/decode_attention.h"
#include "cpu/gated_mlp.h"
#include "cpu/grpo_loss.h"
#include "cpu/huge_pages.h"
#include "cpu/layer_ops.h"
#include "cpu/logprob.h"
#include "cpu/matmul.h"
#include "cpu/packed_attention.h"
#include "cpu/qkv_rope.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"
#include "cpu/sample_tokens.h"
#include "cpu/vector_math.h"
#include "cuda_bindings.h"
#include "dispatch.h"
#include "grpo_params.h"
#include "layer_bindings.h"
#include "team.h"
#include "weights_bindings.h"

namespace py = pybind11;

namespace {

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
  py::gil_scoped_release release;
  if (out != logits) xrl::advise_huge_pages(at<void>(out), sizeof(T) * num_rows * out_stride);
  XRL_DISPATCH(logprob_gradient, rows<T>(logits, num_rows, num_columns, row_stride), tokens, gradients, rows_out,
               num_threads);
}

void grpo_rows(Address logprob, Address entropy, Address old_logprobs, Address rollout_logprobs,
               Address reference_logprobs, Address advantages, Address weights, int64_t num_rows,
               const xrl::GrpoParamsTuple& params, Address out) {
  const xrl::GrpoInputs inputs{at<const float>(old_logprobs), at<const float>(rollout_logprobs),
                               at<const float>(reference_logprobs), at<const float>(advantages),
                               at<const float>(weights)};
  py::gil_scoped_release release;
  XRL_DISPATCH(grpo_rows, at<const float>(logprob), at<const float>(entropy), inputs, xrl::grpo_params(params),
               xrl::GrpoOutputs{at<float>(out), num_rows});
}

template <typename T>
void grpo_single_pass(Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address token_ids,
                      int64_t vocab_start, float inverse_temperature, Address old_logprobs, Address rollout_logprobs,
                      Address reference_logprobs, Address advantages, Address weights,
                      const xrl::GrpoParamsTuple& params, float factor, Address gradient, int64_t gradient_stride,
                      int64_t num_gradient_columns, Address out, int num_threads) {
  check_rows(num_rows, num_columns, row_stride, num_threads);
  xrl::check(gradient == 0 || num_gradient_columns >= num_columns, "num_gradient_columns must be >= num_columns");
  const xrl::ChosenTokens tokens{at<const int64_t>(token_ids), vocab_start, inverse_temperature};
  const xrl::GrpoInputs inputs{at<const float>(old_logprobs), at<const float>(rollout_logprobs),
                               at<const float>(reference_logprobs), at<const float>(advantages),
                               at<const float>(weights)};
  const xrl::OutputRows<T> gradient_out{at<T>(gradient), gradient_stride, num_gradient_columns};
  py::gil_scoped_release release;
  if (gradient != 0 && gradient != logits) {
    xrl::advise_huge_pages(at<void>(gradient), sizeof(T) * num_rows * gradient_stride);
  }
  XRL_DISPATCH(grpo_single_pass, rows<T>(logits, num_rows, num_columns, row_stride), tokens, inputs,
               xrl::grpo_params(params), factor, gradient_out, xrl::SinglePassOutputs{at<float>(out), num_rows},
               num_threads);
}

template <typename T>
void decode_attention(Address query, Address out, int num_heads, int64_t query_stride, Address keys, Address values,
                      int num_kv_heads, int block_size, int head_dim, Address group_starts, int num_groups,
                      Address prompt_blocks, int64_t prompt_blocks_stride, Address prompt_lengths, Address row_blocks,
                      int64_t row_blocks_stride, Address row_lengths, int num_threads) {
  xrl::check_attention(num_heads, num_kv_heads, block_size);
  const xrl::DecodeQueries<T> queries{at<const T>(query), at<T>(out), num_heads, query_stride};
  const xrl::PagedCache<T> cache{at<const T>(keys), at<const T>(values), num_kv_heads, block_size, head_dim};
  const xrl::PagedRows rows{at<const int32_t>(group_starts),   at<const int32_t>(prompt_blocks),
                            at<const int32_t>(prompt_lengths), at<const int32_t>(row_blocks),
                            at<const int32_t>(row_lengths),    num_groups,
                            prompt_blocks_stride,              row_blocks_stride};
  py::gil_scoped_release release;
  XRL_DISPATCH(decode_attention, queries, cache, rows, num_threads);
}

template <typename T>
void rms_norm(Address x, Address weight, float eps, int64_t num_rows, int64_t size, Address out, int num_threads) {
  py::gil_scoped_release release;
  XRL_DISPATCH(rms_norm, at<const T>(x), at<const T>(weight), eps, num_rows, size, at<T>(out), num_threads);
}

template <typename T>
void rope_cache(Address qkv, int64_t num_tokens, int num_heads, int num_kv_heads, int head_dim, Address positions,
                Address slots, Address keys, Address values, int block_size, Address cos, Address sin, Address q_norm,
                Address k_norm, float eps, int num_threads) {
  xrl::check(head_dim % 2 == 0, "head_dim must be even, got " + std::to_string(head_dim));
  const xrl::QkvTokens<T> tokens{at<T>(qkv),
                                 num_tokens,
                                 num_heads,
                                 num_kv_heads,
                                 head_dim,
                                 at<const int32_t>(positions),
                                 at<const int32_t>(slots),
                                 at<T>(keys),
                                 at<T>(values),
                                 block_size};
  const xrl::RopeNorm<T> rope{at<const float>(cos), at<const float>(sin), at<const T>(q_norm), at<const T>(k_norm),
                              eps};
  py::gil_scoped_release release;
  XRL_DISPATCH(rope_cache, tokens, rope, num_threads);
}

void sample_tokens(Address logits, int64_t num_rows, int64_t vocab_size, Address temperatures, Address uniforms,
                   Address token_ids, Address logprobs, int num_threads) {
  py::gil_scoped_release release;
  XRL_DISPATCH(sample_tokens, at<const float>(logits), num_rows, vocab_size, at<const float>(temperatures),
               at<const double>(uniforms), at<int64_t>(token_ids), at<float>(logprobs), num_threads);
}

template <typename T>
void swiglu_forward(Address x, int64_t num_rows, int64_t size, Address out, int num_threads) {
  xrl::check_sizes(num_rows, size, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(swiglu_forward, at<const T>(x), num_rows, size, at<T>(out), num_threads);
}

template <typename T>
void swiglu_backward(Address x, Address grad, int64_t num_rows, int64_t size, Address grad_x, Address out,
                     int num_threads) {
  xrl::check_sizes(num_rows, size, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(swiglu_backward, at<const T>(x), at<const T>(grad), num_rows, size, at<T>(grad_x), at<T>(out),
               num_threads);
}

void populate_pages(const std::vector<Address>& areas, std::size_t num_bytes, int num_threads) {
  std::vector<char*> places;
  for (const Address area : areas) places.push_back(at<char>(area));
  py::gil_scoped_release release;
  xrl::populate_pages(places, num_bytes, num_threads);
}

// (address, row_stride, column_stride)
using MatrixTuple = std::tuple<Address, int64_t, int64_t>;

xrl::StridedMatrix matrix(const MatrixTuple& tuple) {
  const auto& [data, row_stride, column_stride] = tuple;
  return {at<const float>(data), row_stride, column_stride};
}

// (address, row_stride)
using AddendTuple = std::tuple<Address, int64_t>;

xrl::Addend addend(const AddendTuple& tuple) { return {at<const float>(std::get<0>(tuple)), std::get<1>(tuple)}; }

void matmul(const MatrixTuple& a, const MatrixTuple& b, const AddendTuple& start, int64_t rows, int64_t columns,
            int64_t depth, Address c, int64_t c_stride, int num_threads) {
  xrl::check_sizes(rows, columns, num_threads);
  xrl::check_sizes(depth, columns, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(matmul, matrix(a), matrix(b), addend(start), rows, columns, depth, at<float>(c), c_stride, num_threads);
}

int64_t packed_size(int64_t depth, int64_t columns, bool is_gated) {
  int64_t size = 0;
  XRL_DISPATCH(packed_size, depth, columns, is_gated, &size);
  return size;
}

void pack_weight(const MatrixTuple& weight, int64_t depth, int64_t columns, bool is_gated, Address packed,
                 int num_threads) {
  xrl::check_sizes(depth, columns, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(pack_weight, matrix(weight), depth, columns, is_gated, at<float>(packed), num_threads);
}

void packed_matmul(Address a, int64_t a_stride, Address packed, int64_t depth, int64_t columns, bool is_gated,
                   const AddendTuple& start, int64_t rows, Address c, int64_t c_stride, int num_threads) {
  xrl::check_sizes(rows, columns, num_threads);
  xrl::check(std::get<0>(start) == 0 || !is_gated, "a gated product takes no addend");
  py::gil_scoped_release release;
  XRL_DISPATCH(packed_matmul, xrl::StridedMatrix{at<const float>(a), a_stride, 1},
               xrl::PackedWeight{at<const float>(packed), depth, columns, is_gated},
               addend(start), rows, at<float>(c), c_stride, num_threads);
}

// (gate_up, down, inputs, ffn, outputs)
using GatedMlpTuple = std::tuple<Address, Address, int64_t, int64_t, int64_t>;

xrl::GatedMlp gated_mlp(const GatedMlpTuple& tuple) {
  const auto& [gate_up, down, inputs, ffn, outputs] = tuple;
  xrl::check(inputs >= 1 && ffn >= 1 && outputs >= 1, "inputs, ffn and outputs must be >= 1");
  return {at<const float>(gate_up), at<const float>(down), inputs, ffn, outputs};
}

void gated_mlp_forward(Address x, const GatedMlpTuple& mlp, int64_t rows, Address hidden, Address out,
                       int num_threads) {
  const xrl::GatedMlp weights = gated_mlp(mlp);
  xrl::check_sizes(rows, weights.ffn, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(gated_mlp_forward, at<const float>(x), weights, xrl::Addend{nullptr, 0}, rows, at<float>(hidden),
               at<float>(out), num_threads);
}

void gated_mlp_backward(Address grad, const GatedMlpTuple& mlp, int64_t rows, Address hidden, Address activated,
                        Address grad_x, int num_threads) {
  const xrl::GatedMlp weights = gated_mlp(mlp);
  xrl::check_sizes(rows, weights.ffn, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(gated_mlp_backward, at<const float>(grad), weights, rows, at<float>(hidden), at<float>(activated),
               at<float>(grad_x), num_threads);
}

template <typename T>
void rms_norm_forward(Address x, Address weight, int64_t num_rows, int64_t size, float eps, Address out,
                      Address inverse_rms, int num_threads) {
  xrl::check_sizes(num_rows, size, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(rms_norm_forward, at<const T>(x), at<const T>(weight), num_rows, size, eps, at<T>(out),
               at<float>(inverse_rms), num_threads);
}

template <typename T>
void rms_norm_backward(Address x, Address weight, Address inverse_rms, Address grad, int64_t num_rows, int64_t size,
                       Address grad_x, Address grad_weight, int num_threads) {
  xrl::check_sizes(num_rows, size, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(rms_norm_backward, at<const T>(x), at<const T>(weight), at<const float>(inverse_rms), at<const T>(grad),
               static_cast<const T*>(nullptr), num_rows, size, at<T>(grad_x), at<float>(grad_weight), num_threads);
}

template <typename T>
void rotary(Address x, Address cosine, Address sine, int64_t num_tokens, int64_t num_heads, int64_t dim, float sign,
            Address out, int num_threads) {
  xrl::check_sizes(num_tokens, dim, num_threads);
  xrl::check(dim % 2 == 0, "dim must be even, got " + std::to_string(dim));
  py::gil_scoped_release release;
  XRL_DISPATCH(rotary, at<const T>(x), at<const T>(cosine), at<const T>(sine), num_tokens, num_heads, dim, sign,
               at<T>(out), num_threads);
}

// (cosine, sine, q_weight, k_weight, eps)
using RopeTuple = std::tuple<Address, Address, Address, Address, float>;

template <typename T>
xrl::QkvRope<T> qkv_rope(const RopeTuple& tuple) {
  const auto& [cosine, sine, q_weight, k_weight, eps] = tuple;
  return {at<const T>(cosine), at<const T>(sine), at<const T>(q_weight), at<const T>(k_weight), eps};
}

template <typename T>
void qkv_rope_forward(Address mixed, const xrl::QkvTuple& shape, const RopeTuple& rope, Address query, Address key,
                      int num_threads) {
  const xrl::QkvShape qkv = xrl::qkv_shape(shape);
  py::gil_scoped_release release;
  XRL_DISPATCH(qkv_rope_forward, at<const T>(mixed), qkv, qkv_rope<T>(rope), at<T>(query), at<T>(key), num_threads);
}

template <typename T>
void qkv_rope_backward(Address mixed, Address grad_query, Address grad_key, const xrl::QkvTuple& shape,
                       const RopeTuple& rope, Address grad_mixed, Address grad_weights, int num_threads) {
  const xrl::QkvShape qkv = xrl::qkv_shape(shape);
  py::gil_scoped_release release;
  XRL_DISPATCH(qkv_rope_backward, at<const T>(mixed), at<const T>(grad_query), at<const T>(grad_key), qkv,
               qkv_rope<T>(rope), at<T>(grad_mixed), at<float>(grad_weights), num_threads);
}

template <typename T>
void packed_attention_forward(Address query, Address key, Address mixed, const xrl::QkvTuple& shape, float scale,
                              const xrl::SequencesTuple& sequences, Address out, Address log_sums, int num_threads) {
  const xrl::QkvShape qkv = xrl::qkv_shape(shape);
  const xrl::AttentionShape attention = xrl::attention_shape(qkv, scale);
  const int dim = qkv.head_dim;
  const xrl::AttentionForward<T> tensors{
      xrl::dense_heads(at<const T>(query), attention.num_heads, dim),
      xrl::dense_heads(at<const T>(key), attention.num_kv_heads, dim), xrl::values_of(at<const T>(mixed), qkv),
      xrl::dense_heads(at<T>(out), attention.num_heads, dim), at<float>(log_sums)};
  py::gil_scoped_release release;
  XRL_DISPATCH(packed_attention_forward, tensors, xrl::packed_sequences(sequences), attention, num_threads);
}

// qkv: for each token its query heads, then its key heads, then its value heads.
template <typename T>
void prefill_attention(Address qkv, const std::tuple<int, int, int, int64_t, float>& shape,
                       const xrl::SequencesTuple& sequences, Address out, Address log_sums, int num_threads) {
  const auto [num_heads, num_kv_heads, dim, num_tokens, scale] = shape;
  xrl::check(num_kv_heads >= 1 && num_heads % num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads");
  xrl::check(dim > 0 && dim % 16 == 0, "head_dim must be a multiple of 16, got " + std::to_string(dim));
  const int64_t token_stride = static_cast<int64_t>(num_heads + 2 * num_kv_heads) * dim;
  const T* heads = at<const T>(qkv);
  const xrl::AttentionForward<T> tensors{
      {heads, token_stride, dim},
      {heads + num_heads * dim, token_stride, dim},
      {heads + (num_heads + num_kv_heads) * dim, token_stride, dim},
      xrl::dense_heads(at<T>(out), num_heads, dim),
      at<float>(log_sums)};
  const xrl::AttentionShape attention{num_heads, num_kv_heads, dim, num_tokens, scale};
  py::gil_scoped_release release;
  XRL_DISPATCH(packed_attention_forward, tensors, xrl::packed_sequences(sequences), attention, num_threads);
}

template <typename T>
void packed_attention_backward(Address query, Address key, Address mixed, Address out, Address log_sums,
                               Address grad_out, const xrl::QkvTuple& shape, float scale,
                               const xrl::SequencesTuple& sequences, Address grad_query, Address grad_key,
                               Address grad_mixed, int num_threads) {
  const xrl::QkvShape qkv = xrl::qkv_shape(shape);
  const xrl::AttentionShape attention = xrl::attention_shape(qkv, scale);
  const int dim = qkv.head_dim;
  const int num_heads = attention.num_heads;
  const int num_kv_heads = attention.num_kv_heads;
  const xrl::AttentionBackward<T> tensors{xrl::dense_heads(at<const T>(query), num_heads, dim),
                                          xrl::dense_heads(at<const T>(key), num_kv_heads, dim),
                                          xrl::values_of(at<const T>(mixed), qkv),
                                          xrl::dense_heads(at<const T>(out), num_heads, dim),
                                          xrl::dense_heads(at<const T>(grad_out), num_heads, dim),
                                          at<const float>(log_sums),
                                          xrl::dense_heads(at<T>(grad_query), num_heads, dim),
                                          xrl::dense_heads(at<T>(grad_key), num_kv_heads, dim),
                                          xrl::values_of(at<T>(grad_mixed), qkv)};
  py::gil_scoped_release release;
  XRL_DISPATCH(packed_attention_backward, tensors, xrl::packed_sequences(sequences), attention, num_threads);
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

// Every kernel under its name and the number format's.
template <typename T>
void bind(py::module_& module, const std::string& suffix) {
  module.def(("logprob_statistics" + suffix).c_str(), &logprob_statistics<T>);
  module.def(("logprob_gradient" + suffix).c_str(), &logprob_gradient<T>);
  module.def(("grpo_single_pass" + suffix).c_str(), &grpo_single_pass<T>);
  module.def(("swiglu_forward" + suffix).c_str(), &swiglu_forward<T>);
  module.def(("swiglu_backward" + suffix).c_str(), &swiglu_backward<T>);
  module.def(("rms_norm_forward" + suffix).c_str(), &rms_norm_forward<T>);
  module.def(("rms_norm_backward" + suffix).c_str(), &rms_norm_backward<T>);
  module.def(("rotary" + suffix).c_str(), &rotary<T>);
  module.def(("decode_attention" + suffix).c_str(), &decode_attention<T>);
  module.def(("rms_norm" + suffix).c_str(), &rms_norm<T>);
  module.def(("rope_cache" + suffix).c_str(), &rope_cache<T>);
  module.def(("qkv_rope_forward" + suffix).c_str(), &qkv_rope_forward<T>);
  module.def(("qkv_rope_backward" + suffix).c_str(), &qkv_rope_backward<T>);
  module.def(("packed_attention_forward" + suffix).c_str(), &packed_attention_forward<T>);
  module.def(("packed_attention_backward" + suffix).c_str(), &packed_attention_backward<T>);
  module.def(("prefill_attention" + suffix).c_str(), &prefill_attention<T>);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of xrl; call them through xrl.kernels, which checks shapes and types.";
  module.def("cpu_isa", &cpu_isa, "Instruction set the CPU kernels run with.");
  module.def("set_num_threads", &xrl::set_num_threads, py::arg("count"), "Threads that kernels of this process use.");
  module.def("num_threads", &xrl::num_threads, "What set_num_threads said, or 0.");
  bind<float>(module, "_f32");
  bind<xrl::bfloat16>(module, "_bf16");
  module.def("grpo_rows", &grpo_rows);
  module.def("populate_pages", &populate_pages);
  xrl::bind_weights(module);
  xrl::bind_layers(module);
  module.def("matmul", &matmul);
  module.def("packed_size", &packed_size);
  module.def("pack_weight", &pack_weight);
  module.def("packed_matmul", &packed_matmul);
  module.def("gated_mlp_forward", &gated_mlp_forward);
  module.def("gated_mlp_backward", &gated_mlp_backward);
  module.def("sample_tokens", &sample_tokens);
#ifdef XRL_WITH_CUDA
  xrl::bind_cuda(module);
#else
  module.def("cuda_built", [] { return false; });
  module.def("cuda_architectures", [] { return std::vector<std::string>{}; });
#endif
}
