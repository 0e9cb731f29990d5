// Log-prob of one chosen token a row and entropy, over this shard of the vocabulary.
#pragma once

#include <cstdint>

namespace xrl {

// Rows of logits; a row may be longer than the columns that count.
template <typename T>
struct LogitRows {
  const T* data;
  int64_t num_rows;
  int64_t num_columns;  // that count; later ones are padding
  int64_t row_stride;   // elements from a row to the next
};

// Which token of each row is asked for, and at what temperature.
struct ChosenTokens {
  const int64_t* ids;   // over the whole vocabulary
  int64_t vocab_start;  // id of the first column
  float inverse_temperature;
};

// What each row needs to know of its shard, so that shards can be put together. s = (logit - maximum) / temperature.
struct RowStatistics {
  float* maximum;          // of the logits; -inf where no column counts
  float* sum_exp;          // sum of exp(s)
  float* sum_exp_shifted;  // sum of exp(s) * s
  float* target;           // s of the chosen token; 0 where it is on another shard
};

// The gradient of each row's log-prob and entropy, and the statistics of the whole vocabulary it takes.
struct GradientRows {
  const float* maximum;
  const float* log_sum;  // log of the sum of exp(s)
  const float* entropy;
  const float* grad_logprob;
  const float* grad_entropy;  // may be null: zeros
};

// Where gradients go; may be the logits themselves.
template <typename T>
struct OutputRows {
  T* data;
  int64_t row_stride;
  int64_t num_columns;  // to write; those beyond the logits' columns that count get 0
};

}  // namespace xrl

#define XRL_DECLARE_LOGPROB(ISA)                                                                                      \
  namespace xrl::ISA {                                                                                                \
  template <typename T>                                                                                               \
  void logprob_statistics(const LogitRows<T>& logits, const ChosenTokens& tokens, const RowStatistics& out,           \
                          int num_threads);                                                                           \
  template <typename T>                                                                                               \
  void logprob_gradient(const LogitRows<T>& logits, const ChosenTokens& tokens, const GradientRows& rows,             \
                        const OutputRows<T>& out, int num_threads);                                                   \
  }

XRL_DECLARE_LOGPROB(scalar)
XRL_DECLARE_LOGPROB(avx2)
XRL_DECLARE_LOGPROB(avx512)
