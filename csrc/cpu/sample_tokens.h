// One token a row, drawn from softmax(logits / temperature) by inverse transform sampling.
#pragma once

#include <cstdint>

#define XRL_DECLARE_SAMPLE_TOKENS(ISA)                                                                               \
  namespace xrl::ISA {                                                                                               \
  void sample_tokens(const float* logits, int64_t num_rows, int64_t vocab_size, const float* temperatures,           \
                     const double* uniforms, int64_t* token_ids, float* logprobs, int num_threads);                  \
  }

XRL_DECLARE_SAMPLE_TOKENS(scalar)
XRL_DECLARE_SAMPLE_TOKENS(avx2)
XRL_DECLARE_SAMPLE_TOKENS(avx512)
