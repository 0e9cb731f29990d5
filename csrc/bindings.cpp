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
#include "index_checks.h"
#include "layer_bindings.h"
#include "memory_checks.h"
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
  xrl::check(num_rows <= 1 || out_stride >= num_out_columns, "the rows of out must not overlap");
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
  xrl::check(num_rows <= 1 || gradient == 0 || gradient_stride >= num_gradient_columns,
             "the rows of gradient must not overlap");
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

// (address, rows, elements from a row to the next, heads)
using QueriesTuple = std::tuple<Address, int64_t, int64_t, int>;
// (keys, values, blocks, KV heads, tokens of a block, head size)
using CacheTuple = std::tuple<Address, Address, int64_t, int, int, int>;

template <typename T>
void decode_attention(const QueriesTuple& query_tuple, Address out, const CacheTuple& cache_tuple,
                      const xrl::PagedRowsTuple& rows_tuple, int num_threads) {
  const auto& [query, num_rows, query_stride, num_heads] = query_tuple;
  const auto& [keys, values, num_blocks, num_kv_heads, block_size, head_dim] = cache_tuple;
  xrl::check_attention(num_heads, num_kv_heads, block_size);
  const xrl::DecodeQueries<T> queries{at<const T>(query), at<T>(out), num_heads, query_stride};
  const xrl::PagedCache<T> cache{at<const T>(keys), at<const T>(values), num_kv_heads, block_size, head_dim};
  const xrl::PagedRows rows = xrl::paged_rows(rows_tuple);
  xrl::check_paged_rows(rows, num_rows, block_size, num_blocks);
  py::gil_scoped_release release;
  XRL_DISPATCH(decode_attention, queries, cache, rows, num_threads);
}

template <typename T>
void rms_norm(Address x, Address weight, float eps, int64_t num_rows, int64_t size, Address out, int num_threads) {
  py::gil_scoped_release release;
  XRL_DISPATCH(rms_norm, at<const T>(x), at<const T>(weight), eps, num_rows, size, at<T>(out), num_threads);
}

// (address, tokens, query heads, KV heads, head size)
using QkvTokensTuple = std::tuple<Address, int64_t, int, int, int>;
// (positions, cos, sin, positions in these tables, q_norm, k_norm, eps)
using RopeNormTuple = std::tuple<Address, Address, Address, int64_t, Address, Address, float>;
// (slots, keys, values, blocks, tokens of a block)
using CacheSlotsTuple = std::tuple<Address, Address, Address, int64_t, int>;

template <typename T>
void rope_cache(const QkvTokensTuple& qkv_tuple, const RopeNormTuple& rope_tuple, const CacheSlotsTuple& cache_tuple,
                int num_threads) {
  const auto& [qkv, num_tokens, num_heads, num_kv_heads, head_dim] = qkv_tuple;
  const auto& [positions, cos, sin, num_positions, q_norm, k_norm, eps] = rope_tuple;
  const auto& [slots, keys, values, num_blocks, block_size] = cache_tuple;
  xrl::check(num_heads >= 0 && num_kv_heads >= 0 && block_size >= 1,
             "num_heads and num_kv_heads must be >= 0 and block_size >= 1");
  xrl::check(head_dim >= 0 && head_dim % 2 == 0, "head_dim must be even, got " + std::to_string(head_dim));
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
  xrl::check_positions(tokens.positions, num_tokens, num_positions);
  xrl::check_slots(tokens.slots, num_tokens, num_blocks * block_size);
  const int64_t head_bytes = static_cast<int64_t>(sizeof(T)) * head_dim, table_bytes = num_positions * head_dim * 2;
  const int64_t cache_bytes = num_blocks * num_kv_heads * block_size * head_bytes;
  xrl::check_apart({{"qkv", qkv, num_tokens * (num_heads + 2 * num_kv_heads) * head_bytes},
                    {"key_cache", keys, cache_bytes},
                    {"value_cache", values, cache_bytes}},
                   {{"cos", cos, table_bytes},
                    {"sin", sin, table_bytes},
                    {"positions", positions, 4 * num_tokens},
                    {"slots", slots, 4 * num_tokens},
                    {"q_norm", q_norm, head_bytes},
                    {"k_norm", k_norm, head_bytes}});
  py::gil_scoped_release release;
  XRL_DISPATCH(rope_cache, tokens, rope, num_threads);
}

// What no distribution can be made with is refused, a row at a time: these are few numbers beside the logits.
void check_draws(const float* temperatures, const double* uniforms, int64_t num_rows) {
  for (int64_t row = 0; row < num_rows; ++row) {
    if (!(temperatures[row] >= 0.0f)) {
      throw std::invalid_argument("temperatures must be >= 0, got " + std::to_string(temperatures[row]) + " in row " +
                                  std::to_string(row));
    }
    if (!(uniforms[row] >= 0.0 && uniforms[row] < 1.0)) {
      throw std::invalid_argument("uniforms must be in [0, 1), got " + std::to_string(uniforms[row]) + " in row " +
                                  std::to_string(row));
    }
  }
}

void sample_tokens(Address logits, int64_t num_rows, int64_t vocab_size, Address temperatures, Address uniforms,
                   Address token_ids, Address logprobs, int num_threads) {
  check_draws(at<const float>(temperatures), at<const double>(uniforms), num_rows);
  py::gil_scoped_release release;
  XRL_DISPATCH(sample_tokens, at<const float>(logits), num_rows, vocab_size, at<const float>(temperatures),
               at<const double>(uniforms), at<int64_t>(token_ids), at<float>(logprobs), num_threads);
}

template <typename T>
void swiglu_forward(Address x, int64_t num_rows, int64_t size, Address out, int num_threads) {
  xrl::check_sizes(num_rows, size, num_threads);
  const int64_t num_bytes = num_rows * size * static_cast<int64_t>(sizeof(T));
  xrl::check_apart({{"out", out, num_bytes}}, {{"x", x, 2 * num_bytes}});
  py::gil_scoped_release release;
  XRL_DISPATCH(swiglu_forward, at<const T>(x), num_rows, size, at<T>(out), num_threads);
}

template <typename T>
void swiglu_backward(Address x, Address grad, int64_t num_rows, int64_t size, Address grad_x, Address out,
                     int num_threads) {
  xrl::check_sizes(num_rows, size, num_threads);
  const int64_t num_bytes = num_rows * size * static_cast<int64_t>(sizeof(T));
  const xrl::Span given{"x", x, 2 * num_bytes}, given_grad{"grad", grad, num_bytes};
  const xrl::Span gradient{"grad_x", grad_x, 2 * num_bytes}, once_more{"out", out, num_bytes};
  xrl::check_same_or_apart(gradient, given);
  xrl::check_same_or_apart(once_more, given_grad);
  xrl::check_apart({gradient, once_more}, {});
  xrl::check_apart({gradient}, {given_grad});
  xrl::check_apart({once_more}, {given});
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
  const auto& [a_start, a_row_stride, a_column_stride] = a;
  const auto& [b_start, b_row_stride, b_column_stride] = b;
  const auto& [start_start, start_stride] = start;
  xrl::check(rows <= 1 || c_stride >= columns, "the rows of out must not overlap");
  const xrl::MatrixSpan out{"out", c, rows, columns, c_stride, 1};
  for (const xrl::MatrixSpan& factor : {xrl::MatrixSpan{"a", a_start, rows, depth, a_row_stride, a_column_stride},
                                        xrl::MatrixSpan{"b", b_start, depth, columns, b_row_stride, b_column_stride}}) {
    if (xrl::overlap(out, factor)) xrl::refuse_overlap("out", factor.name);
  }
  const bool adds_in_place = start_start == c && (start_stride == c_stride || rows == 1);
  if (!adds_in_place && xrl::overlap(out, {"addend", start_start, rows, columns, start_stride, 1})) {
    xrl::refuse_overlap("out", "addend");
  }
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
  xrl::check_sequences(xrl::packed_sequences(sequences), qkv.num_tokens);
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
  xrl::check_sequences(xrl::packed_sequences(sequences), num_tokens);
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
  xrl::check_sequences(xrl::packed_sequences(sequences), qkv.num_tokens);
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
  module.def("set_num_threads", &set_num_threads, py::arg("count"), "Threads that kernels of this process use.");
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
