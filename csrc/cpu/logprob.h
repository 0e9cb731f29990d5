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

// What each row needs to know of its shard, so that shards can be put together. s = logit / temperature - maximum.
struct RowStatistics {
  float* maximum;          // of logit / temperature; -inf where no column counts
  float* sum_exp;          // sum of exp(s)
  float* sum_exp_shifted;  // sum of exp(s) * s
  float* target;           // logit / temperature of the chosen token; 0 where it is on another shard
};

}  // namespace xrl

#define XRL_DECLARE_LOGPROB(ISA)                                                                                     \
  namespace xrl::ISA {                                                                                               \
  template <typename T>                                                                                              \
  void logprob_statistics(const LogitRows<T>& logits, const int64_t* token_ids, int64_t vocab_start,                 \
                          float inverse_temperature, const RowStatistics& out, int num_threads);                     \
  template <typename T>                                                                                              \
  void logprob_backward(const LogitRows<T>& logits, const int64_t* token_ids, int64_t vocab_start,                   \
                        float inverse_temperature, const float* logsumexp, const float* entropy,                     \
                        const float* grad_logprob, const float* grad_entropy, T* grad_logits, int64_t grad_stride,   \
                        int64_t num_grad_columns, int num_threads);                                                  \
  }

XRL_DECLARE_LOGPROB(scalar)
XRL_DECLARE_LOGPROB(avx2)
XRL_DECLARE_LOGPROB(avx512)
