// All layers of a decoder for one new token a row, fp32, in one call.
#pragma once

#include <cstdint>

#include "cpu/decode_attention.h"
#include "cpu/matmul.h"

namespace xrl {

// Sizes that all layers share.
struct DecoderShape {
  int64_t hidden;
  int64_t ffn;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_size;  // tokens of a block of the cache
  float eps;       // of the norms
};

// Weights packed by pack_weight, of which gate_up is gated; and the layer's part of the cache.
struct DecodeLayer {
  const float* input_norm;
  const float* qkv;
  const float* qkv_bias;  // or null
  const float* q_norm;    // or null
  const float* k_norm;    // or null
  const float* attention_out;
  const float* mlp_norm;
  const float* gate_up;
  const float* down;
  float* keys;
  float* values;
};

// The new tokens and what they see.
struct DecoderRows {
  int64_t count;
  const int32_t* positions;  // [count]
  const int32_t* slots;      // [count] in the cache, or -1
  PagedRows context;
  const float* cos;  // [max_positions, head_dim / 2]
  const float* sin;
};

}  // namespace xrl

#define XRL_DECLARE_DECODE_LAYERS(ISA)                                                                              \
  namespace xrl::ISA {                                                                                              \
  /* x[rows.count, hidden]: the embeddings of the tokens, then what the last layer makes of them */                 \
  void decode_layers(const DecodeLayer* layers, int64_t num_layers, const DecoderShape& shape,                      \
                     const DecoderRows& rows, float* x, int num_threads);                                           \
  }

XRL_DECLARE_DECODE_LAYERS(scalar)
XRL_DECLARE_DECODE_LAYERS(avx2)
XRL_DECLARE_DECODE_LAYERS(avx512)
