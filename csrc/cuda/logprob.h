// Launchers of the log-prob kernels; all return before the device is done.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/logprob.h"
#include "cuda/launch.h"

namespace xrl::cuda {

// Which token of each row is asked for, and at what temperature.
struct ChosenTokens {
  const void* ids;      // over the whole vocabulary
  bool is_64_bit;       // int64, else int32
  int64_t vocab_start;  // id of the first column
  float inverse_temperature;
};

// Reads the logits once. The same sums in every run: no two threads add to one place.
template <typename T>
void logprob_statistics(const LogitRows<T>& logits, const ChosenTokens& tokens, const RowStatistics& out,
                        Stream stream);

// Reads the logits once and writes once; `out` may be the logits. Rows without a gradient are only written.
template <typename T>
void logprob_gradient(const LogitRows<T>& logits, const ChosenTokens& tokens, const GradientRows& rows,
                      const OutputRows<T>& out, Stream stream);

// Why the kernels cannot run on the current device (driver too old, no code for its architecture); empty if they can.
std::string why_not();

}  // namespace xrl::cuda
