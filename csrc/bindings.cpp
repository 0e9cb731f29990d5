// Names and argument checks only. Tensors come in as addresses, so that no torch header is needed and the module
// loads under any torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "check.h"
#include "cpu/decode_attention.h"
#include "cpu/logprob.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"
#include "cpu/sample_tokens.h"
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

template <typename T>
void decode_attention(Address query, Address out, int num_heads, int64_t query_stride, Address keys, Address values,
                      int num_kv_heads, int block_size, int head_dim, Address group_starts, int num_groups,
                      Address prompt_blocks, int64_t prompt_blocks_stride, Address prompt_lengths, Address row_blocks,
                      int64_t row_blocks_stride, Address row_lengths, int num_threads) {
  xrl::check(num_heads % num_kv_heads == 0 && num_heads / num_kv_heads <= xrl::kMaxQueriesPerHead,
             "num_heads must be a multiple of num_kv_heads, at most " + std::to_string(xrl::kMaxQueriesPerHead) +
                 " times as many");
  xrl::check(block_size > 0 && xrl::kSpanTokens % block_size == 0,
             "block_size must divide " + std::to_string(xrl::kSpanTokens) + ", got " + std::to_string(block_size));
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
  module.def("decode_attention_f32", &decode_attention<float>);
  module.def("decode_attention_bf16", &decode_attention<xrl::bfloat16>);
  module.def("rms_norm_f32", &rms_norm<float>);
  module.def("rms_norm_bf16", &rms_norm<xrl::bfloat16>);
  module.def("rope_cache_f32", &rope_cache<float>);
  module.def("rope_cache_bf16", &rope_cache<xrl::bfloat16>);
  module.def("sample_tokens", &sample_tokens);
}
