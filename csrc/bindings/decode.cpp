// The engine's steps: layers over a paged cache of keys and values, without gradients, and the sampling.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "address.h"
#include "arguments.h"
#include "bindings/bindings.h"
#include "check.h"
#include "cpu/decode_attention.h"
#include "cpu/decode_layers.h"
#include "cpu/huge_pages.h"
#include "cpu/packed_attention.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"
#include "cpu/sample_tokens.h"
#include "cpu/vector_math.h"
#include "dispatch.h"
#include "index_checks.h"
#include "memory_checks.h"

namespace py = pybind11;

namespace {

using py::arg;
using xrl::Address;
using xrl::at;

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

void populate_pages(const std::vector<Address>& areas, std::size_t num_bytes, int num_threads) {
  std::vector<char*> places;
  for (const Address area : areas) places.push_back(at<char>(area));
  py::gil_scoped_release release;
  xrl::populate_pages(places, num_bytes, num_threads);
}

// (hidden, ffn, num_heads, num_kv_heads, head_dim, block_size, eps)
using DecoderShapeTuple = std::tuple<int64_t, int64_t, int, int, int, int, float>;
// (num_rows, positions, slots, cos, sin, positions in these tables)
using DecoderRowsTuple = std::tuple<int64_t, Address, Address, Address, Address, int64_t>;
// Addresses in the order of xrl::DecodeLayer.
using DecodeLayerArray = std::array<Address, 11>;

xrl::Span span(const char* name, const float* place, int64_t num_floats) {
  return {name, reinterpret_cast<Address>(place), 4 * num_floats};
}

// What a step writes: x, and in each layer the cache, which must be no other tensor's memory.
void check_written(const float* x, const xrl::DecodeLayer& layer, const xrl::DecoderShape& shape,
                   const xrl::DecoderRows& rows, int64_t num_blocks, int64_t num_positions) {
  const int64_t cache_floats = num_blocks * shape.num_kv_heads * shape.block_size * shape.head_dim;
  const int64_t table_floats = num_positions * (shape.head_dim / 2);
  xrl::check_apart({span("x", x, rows.count * shape.hidden), span("keys", layer.keys, cache_floats),
                    span("values", layer.values, cache_floats)},
                   {span("input_norm", layer.input_norm, shape.hidden), span("mlp_norm", layer.mlp_norm, shape.hidden),
                    span("q_norm", layer.q_norm, shape.head_dim), span("k_norm", layer.k_norm, shape.head_dim),
                    span("cos", rows.cos, table_floats), span("sin", rows.sin, table_floats)});
}

void decode_layers(Address x, const std::vector<DecodeLayerArray>& layers, const DecoderShapeTuple& shape_tuple,
                   const DecoderRowsTuple& rows_tuple, const xrl::PagedRowsTuple& context_tuple, int64_t num_blocks,
                   int num_threads) {
  const auto [hidden, ffn, num_heads, num_kv_heads, head_dim, block_size, eps] = shape_tuple;
  const auto [num_rows, positions, slots, cos, sin, num_positions] = rows_tuple;
  xrl::check_attention(num_heads, num_kv_heads, block_size);
  xrl::check_sizes(num_rows, hidden, num_threads);
  const xrl::DecoderShape shape{hidden, ffn, num_heads, num_kv_heads, head_dim, block_size, eps};
  const xrl::PagedRows context = xrl::paged_rows(context_tuple);
  const xrl::DecoderRows rows{num_rows, at<const int32_t>(positions), at<const int32_t>(slots), context,
                              at<const float>(cos), at<const float>(sin)};
  xrl::check_paged_rows(context, num_rows, block_size, num_blocks);
  xrl::check_positions(rows.positions, num_rows, num_positions);
  xrl::check_slots(rows.slots, num_rows, num_blocks * block_size);
  std::vector<xrl::DecodeLayer> addressed;
  addressed.reserve(layers.size());
  for (const auto& [input_norm, qkv, qkv_bias, q_norm, k_norm, attention_out, mlp_norm, gate_up, down, keys, values] :
       layers) {
    addressed.push_back({at<const float>(input_norm), at<const float>(qkv), at<const float>(qkv_bias),
                         at<const float>(q_norm), at<const float>(k_norm), at<const float>(attention_out),
                         at<const float>(mlp_norm), at<const float>(gate_up), at<const float>(down), at<float>(keys),
                         at<float>(values)});
    check_written(at<const float>(x), addressed.back(), shape, rows, num_blocks, num_positions);
  }
  py::gil_scoped_release release;
  XRL_DISPATCH(decode_layers, addressed.data(), addressed.size(), shape, rows, at<float>(x), num_threads);
}

// Every kernel under its name and the number format's.
template <typename T>
void bind(py::module_& module, const std::string& suffix) {
  module.def(("decode_attention" + suffix).c_str(), &decode_attention<T>, arg("queries"), arg("out"), arg("cache"),
             arg("rows"), arg("num_threads"));
  module.def(("rms_norm" + suffix).c_str(), &rms_norm<T>, arg("x"), arg("weight"), arg("eps"), arg("num_rows"),
             arg("size"), arg("out"), arg("num_threads"));
  module.def(("rope_cache" + suffix).c_str(), &rope_cache<T>, arg("qkv"), arg("rope"), arg("cache"),
             arg("num_threads"));
  module.def(("prefill_attention" + suffix).c_str(), &prefill_attention<T>, arg("qkv"), arg("shape"), arg("sequences"),
             arg("out"), arg("log_sums"), arg("num_threads"));
}

}  // namespace

void xrl::bind_decode(py::module_& module) {
  bind<float>(module, "_f32");
  bind<xrl::bfloat16>(module, "_bf16");
  module.def("sample_tokens", &sample_tokens, arg("logits"), arg("num_rows"), arg("vocab_size"), arg("temperatures"),
             arg("uniforms"), arg("token_ids"), arg("logprobs"), arg("num_threads"));
  module.def("populate_pages", &::populate_pages, arg("areas"), arg("num_bytes"), arg("num_threads"));
  module.def("decode_layers", &decode_layers, arg("x"), arg("layers"), arg("shape"), arg("rows"), arg("context"),
             arg("num_blocks"), arg("num_threads"));
}
