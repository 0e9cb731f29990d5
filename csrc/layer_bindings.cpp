#include "layer_bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "address.h"
#include "arguments.h"
#include "check.h"
#include "cpu/decode_layers.h"
#include "cpu/train_layer.h"
#include "dispatch.h"
#include "index_checks.h"
#include "memory_checks.h"

namespace py = pybind11;

namespace {

using xrl::Address;
using xrl::at;

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

// (rows, hidden, ffn, eps, scale)
using TrainShapeTuple = std::tuple<int64_t, int64_t, int64_t, float, float>;
// Addresses in the order of xrl::LayerParameters.
using ParametersArray = std::array<Address, 9>;

template <typename T>
xrl::LayerParameters<T> parameters(const ParametersArray& addresses) {
  const auto& [input_norm, qkv, qkv_bias, q_norm, k_norm, attention_out, mlp_norm, gate_up, down] = addresses;
  return {at<T>(input_norm),    at<T>(qkv),      at<T>(qkv_bias), at<T>(q_norm), at<T>(k_norm),
          at<T>(attention_out), at<T>(mlp_norm), at<T>(gate_up),  at<T>(down)};
}

xrl::TrainLayerShape train_shape(const TrainShapeTuple& tuple, const xrl::QkvTuple& qkv) {
  const auto& [rows, hidden, ffn, eps, scale] = tuple;
  const xrl::QkvShape heads = xrl::qkv_shape(qkv);
  xrl::check(hidden >= 1 && ffn >= 1, "hidden and ffn must be >= 1");
  xrl::check(rows >= 1 && heads.num_tokens <= rows, "rows must be >= 1 and at least the tokens of all sequences");
  return {rows, heads, hidden, ffn, eps, scale};
}

// (shape, QKV shape, weights, sequences, cosine, sine)
using TrainLayerTuple =
    std::tuple<TrainShapeTuple, xrl::QkvTuple, ParametersArray, xrl::SequencesTuple, Address, Address>;

xrl::TrainLayer train_layer(const TrainLayerTuple& tuple) {
  const auto& [shape, qkv, weights, sequences, cosine, sine] = tuple;
  xrl::check_sequences(xrl::packed_sequences(sequences), std::get<0>(qkv));
  return {train_shape(shape, qkv), parameters<const float>(weights), xrl::packed_sequences(sequences),
          at<const float>(cosine), at<const float>(sine)};
}

int64_t train_layer_kept(const TrainShapeTuple& shape, const xrl::QkvTuple& qkv) {
  return xrl::KeptActivations::size(train_shape(shape, qkv));
}

void train_layer_forward(const TrainLayerTuple& tuple, Address x, Address kept, Address out, int num_threads) {
  const xrl::TrainLayer layer = train_layer(tuple);
  xrl::check_sizes(layer.shape.rows, layer.shape.hidden, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(train_layer_forward, layer, at<const float>(x), xrl::KeptActivations(layer.shape, at<float>(kept)),
               at<float>(out), num_threads);
}

void train_layer_backward(const TrainLayerTuple& tuple, Address x, Address kept, Address grad,
                          const ParametersArray& gradients, Address grad_x, int num_threads) {
  const xrl::TrainLayer layer = train_layer(tuple);
  xrl::check_sizes(layer.shape.rows, layer.shape.hidden, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(train_layer_backward, layer, at<const float>(x), xrl::KeptActivations(layer.shape, at<float>(kept)),
               at<const float>(grad), parameters<float>(gradients), at<float>(grad_x), num_threads);
}

}  // namespace

namespace xrl {

void bind_layers(py::module_& module) {
  module.def("decode_layers", &decode_layers);
  module.def("train_layer_kept", &train_layer_kept);
  module.def("train_layer_forward", &train_layer_forward);
  module.def("train_layer_backward", &train_layer_backward);
}

}  // namespace xrl
