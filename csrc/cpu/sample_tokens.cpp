#include "cpu/sample_tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/vector_math.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

// Sums run in fp32 within a block and in fp64 across blocks, so that the rarest of 150,000 tokens keep their share,
// and only the block in which the draw falls is looked at token by token.
constexpr int64_t kBlock = 512;

// exp((x[i] - maximum) / temperature); a number at most 1.
inline float unnormalised(float x, float maximum, float inverse_temperature) {
  return exp_nonpositive((x - maximum) * inverse_temperature);
}

inline int64_t first_equal(const float* x, int64_t size, float value) {
  for (int64_t i = 0; i < size; ++i) {
    if (x[i] == value) return i;
  }
  return 0;  // a row of NaN
}

// First token of [start, stop) whose cumulative weight, beginning at `cumulative`, exceeds the target. Where rounding
// leaves none, the last one that can be drawn at all.
inline int64_t find_token(const float* x, int64_t start, int64_t stop, float maximum, float inverse_temperature,
                          double cumulative, double target) {
  int64_t last_possible = start;
  for (int64_t i = start; i < stop; ++i) {
    const float weight = unnormalised(x[i], maximum, inverse_temperature);
    if (weight > 0.0f) last_possible = i;
    cumulative += weight;
    if (cumulative > target) break;
  }
  return last_possible;
}

}  // namespace

void sample_tokens(const float* logits, int64_t num_rows, int64_t vocab_size, const float* temperatures,
                   const double* uniforms, int64_t* token_ids, float* logprobs, int num_threads) {
  const int64_t num_blocks = (vocab_size + kBlock - 1) / kBlock;
  for_ranges(num_rows, num_threads, [&](const Range& range) {
    const std::unique_ptr<double[]> block_sums(new double[num_blocks]);
    for (int64_t row = range.first; row < range.last; ++row) {
      const float* x = logits + row * vocab_size;
      const bool greedy = temperatures[row] == 0.0f;
      // The smallest ones have no inverse, and that of the highest would make a number of 0 * -inf.
      using Limits = std::numeric_limits<float>;
      const float inverse_temperature =
          greedy ? 1.0f : 1.0f / std::clamp(temperatures[row], Limits::min(), Limits::max());
      float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
      for (int64_t i = 0; i < vocab_size; ++i) maximum = std::max(maximum, x[i]);
      double total = 0.0;
      for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t stop = std::min((block + 1) * kBlock, vocab_size);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = block * kBlock; i < stop; ++i) sum += unnormalised(x[i], maximum, inverse_temperature);
        block_sums[block] = sum;
        total += sum;
      }
      int64_t token;
      if (greedy) {
        token = first_equal(x, vocab_size, maximum);
      } else {
        const double target = uniforms[row] * total;
        double cumulative = 0.0;
        int64_t block = 0;
        while (block + 1 < num_blocks && cumulative + block_sums[block] <= target) cumulative += block_sums[block++];
        if (block_sums[block] == 0.0) {  // rounding went past the last token that can be drawn: take that one
          while (block > 0 && block_sums[block] == 0.0) --block;
          cumulative = -std::numeric_limits<double>::infinity();
        }
        const int64_t stop = std::min((block + 1) * kBlock, vocab_size);
        token = find_token(x, block * kBlock, stop, maximum, inverse_temperature, cumulative, target);
      }
      token_ids[row] = token;
      logprobs[row] = static_cast<float>((x[token] - maximum) * inverse_temperature - std::log(total));
    }
  });
}

}  // namespace xrl::XRL_ISA
