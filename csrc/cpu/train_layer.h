// A dense decoder layer for training, fp32: its forward pass and its backward pass, each in one call. Between two
// operations nothing else runs, whose code and data would have to come from memory again after each of them.
#pragma once

#include <cstdint>

#include "cpu/packed_attention.h"
#include "cpu/qkv_rope.h"

namespace xrl {

struct TrainLayerShape {
  int64_t rows;  // of which qkv.num_tokens belong to sequences; the others stand behind them
  QkvShape qkv;
  int64_t hidden;
  int64_t ffn;
  float eps;    // of the norms
  float scale;  // of the scores

  int num_heads() const { return qkv.num_kv_heads * qkv.queries_per_key; }
  int64_t query_width() const { return static_cast<int64_t>(num_heads()) * qkv.head_dim; }
  int64_t qkv_width() const { return query_width() + 2 * static_cast<int64_t>(qkv.num_kv_heads) * qkv.head_dim; }
};

// The layer's parameters, or their gradients; a matrix has a row for each output.
template <typename T>
struct LayerParameters {
  T* input_norm;
  T* qkv;
  T* qkv_bias;  // may be null, as the next two
  T* q_norm;
  T* k_norm;
  T* attention_out;
  T* mlp_norm;
  T* gate_up;  // the gate's rows first
  T* down;
};

struct TrainLayer {
  TrainLayerShape shape;
  LayerParameters<const float> weights;
  PackedSequences sequences;
  const float* cosine;  // [qkv.num_tokens, head_dim]
  const float* sine;
};

// What the forward pass keeps for the backward pass, one after the other at one place.
struct KeptActivations {
  float* input_normed;       // [rows, hidden]
  float* input_inverse_rms;  // [rows]
  float* mixed;              // [rows, qkv_width]
  float* attended;           // [rows, query_width]
  float* log_sums;           // [num_heads, num_tokens]
  float* between;            // [rows, hidden] after the attention
  float* mlp_normed;         // [rows, hidden]
  float* mlp_inverse_rms;    // [rows]
  float* gate_up;            // [rows, 2 * ffn] before SwiGLU

  KeptActivations(const TrainLayerShape& shape, float* place) : size_(0), place_(place) {
    input_normed = take(shape.rows * shape.hidden);
    input_inverse_rms = take(shape.rows);
    mixed = take(shape.rows * shape.qkv_width());
    attended = take(shape.rows * shape.query_width());
    log_sums = take(shape.num_heads() * shape.qkv.num_tokens);
    between = take(shape.rows * shape.hidden);
    mlp_normed = take(shape.rows * shape.hidden);
    mlp_inverse_rms = take(shape.rows);
    gate_up = take(shape.rows * 2 * shape.ffn);
  }

  // Floats that they take.
  static int64_t size(const TrainLayerShape& shape) { return KeptActivations(shape, nullptr).size_; }

 private:
  float* take(int64_t count) {
    float* start = place_ == nullptr ? nullptr : place_ + size_;
    size_ += (count + 15) / 16 * 16;
    return start;
  }

  int64_t size_;
  float* place_;
};

}  // namespace xrl

#define XRL_DECLARE_TRAIN_LAYER(ISA)                                                                                \
  namespace xrl::ISA {                                                                                              \
  /* x, out [rows, hidden] */                                                                                       \
  void train_layer_forward(const TrainLayer& layer, const float* x, const KeptActivations& kept, float* out,        \
                           int num_threads);                                                                        \
  /* Overwrites what was kept. Adds to the gradients of parameters, of which those that are null are not wanted. */ \
  void train_layer_backward(const TrainLayer& layer, const float* x, const KeptActivations& kept, const float* grad, \
                            const LayerParameters<float>& gradients, float* grad_x, int num_threads);               \
  }

XRL_DECLARE_TRAIN_LAYER(scalar)
XRL_DECLARE_TRAIN_LAYER(avx2)
XRL_DECLARE_TRAIN_LAYER(avx512)
