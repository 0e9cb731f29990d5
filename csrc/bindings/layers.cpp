// The training pass of a layer, forward and backward: its operations one by one, and all of it in one call.
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
#include "cpu/gated_mlp.h"
#include "cpu/layer_ops.h"
#include "cpu/packed_attention.h"
#include "cpu/qkv_rope.h"
#include "cpu/train_layer.h"
#include "cpu/vector_math.h"
#include "dispatch.h"
#include "index_checks.h"
#include "memory_checks.h"

namespace py = pybind11;

namespace {

using py::arg;
using xrl::Address;
using xrl::at;

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

// Every kernel under its name and the number format's.
template <typename T>
void bind(py::module_& module, const std::string& suffix) {
  module.def(("swiglu_forward" + suffix).c_str(), &swiglu_forward<T>, arg("x"), arg("num_rows"), arg("size"),
             arg("out"), arg("num_threads"));
  module.def(("swiglu_backward" + suffix).c_str(), &swiglu_backward<T>, arg("x"), arg("grad"), arg("num_rows"),
             arg("size"), arg("grad_x"), arg("out"), arg("num_threads"));
  module.def(("rms_norm_forward" + suffix).c_str(), &rms_norm_forward<T>, arg("x"), arg("weight"), arg("num_rows"),
             arg("size"), arg("eps"), arg("out"), arg("inverse_rms"), arg("num_threads"));
  module.def(("rms_norm_backward" + suffix).c_str(), &rms_norm_backward<T>, arg("x"), arg("weight"), arg("inverse_rms"),
             arg("grad"), arg("num_rows"), arg("size"), arg("grad_x"), arg("grad_weight"), arg("num_threads"));
  module.def(("rotary" + suffix).c_str(), &rotary<T>, arg("x"), arg("cosine"), arg("sine"), arg("num_tokens"),
             arg("num_heads"), arg("dim"), arg("sign"), arg("out"), arg("num_threads"));
  module.def(("qkv_rope_forward" + suffix).c_str(), &qkv_rope_forward<T>, arg("mixed"), arg("shape"), arg("rope"),
             arg("query"), arg("key"), arg("num_threads"));
  module.def(("qkv_rope_backward" + suffix).c_str(), &qkv_rope_backward<T>, arg("mixed"), arg("grad_query"),
             arg("grad_key"), arg("shape"), arg("rope"), arg("grad_mixed"), arg("grad_weights"), arg("num_threads"));
  module.def(("packed_attention_forward" + suffix).c_str(), &packed_attention_forward<T>, arg("query"), arg("key"),
             arg("mixed"), arg("shape"), arg("scale"), arg("sequences"), arg("out"), arg("log_sums"),
             arg("num_threads"));
  module.def(("packed_attention_backward" + suffix).c_str(), &packed_attention_backward<T>, arg("query"), arg("key"),
             arg("mixed"), arg("out"), arg("log_sums"), arg("grad_out"), arg("shape"), arg("scale"), arg("sequences"),
             arg("grad_query"), arg("grad_key"), arg("grad_mixed"), arg("num_threads"));
}

}  // namespace

void xrl::bind_layers(py::module_& module) {
  bind<float>(module, "_f32");
  bind<xrl::bfloat16>(module, "_bf16");
  module.def("gated_mlp_forward", &gated_mlp_forward, arg("x"), arg("mlp"), arg("rows"), arg("hidden"), arg("out"),
             arg("num_threads"));
  module.def("gated_mlp_backward", &gated_mlp_backward, arg("grad"), arg("mlp"), arg("rows"), arg("hidden"),
             arg("activated"), arg("grad_x"), arg("num_threads"));
  module.def("train_layer_kept", &train_layer_kept, arg("shape"), arg("qkv"));
  module.def("train_layer_forward", &train_layer_forward, arg("layer"), arg("x"), arg("kept"), arg("out"),
             arg("num_threads"));
  module.def("train_layer_backward", &train_layer_backward, arg("layer"), arg("x"), arg("kept"), arg("grad"),
             arg("gradients"), arg("grad_x"), arg("num_threads"));
}
