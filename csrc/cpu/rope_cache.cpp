#include "cpu/rope_cache.h"

#include <cstring>

#include "cpu/inverse_rms.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

// Normalise one head (where it has a norm) and rotate its halves, in place.
template <typename T>
inline void rotate(T* head, int head_dim, const T* norm, float eps, const float* cos, const float* sin) {
  const int half = head_dim / 2;
  const float scale = norm == nullptr ? 1.0f : inverse_rms(head, head_dim, eps);
#pragma omp simd
  for (int d = 0; d < half; ++d) {
    float first = load(head[d]);
    float second = load(head[half + d]);
    if (norm != nullptr) {
      first = rounded_to(head, load(norm[d]) * rounded_to(head, first * scale));
      second = rounded_to(head, load(norm[half + d]) * rounded_to(head, second * scale));
    }
    store(head + d, first * cos[d] - second * sin[d]);
    store(head + half + d, second * cos[d] + first * sin[d]);
  }
}

}  // namespace

template <typename T>
void rope_cache(const QkvTokens<T>& tokens, const RopeNorm<T>& rope, int num_threads) {
  const int dim = tokens.head_dim;
  const int num_heads = tokens.num_heads;
  const int num_kv_heads = tokens.num_kv_heads;
  for_ranges(tokens.num_tokens, num_threads, [&](const Range& range) {
    for (int64_t token = range.first; token < range.last; ++token) {
      T* heads = tokens.qkv + token * (num_heads + 2 * num_kv_heads) * dim;
      const int64_t angle = static_cast<int64_t>(tokens.positions[token]) * (dim / 2);
      for (int h = 0; h < num_heads + num_kv_heads; ++h) {
        const T* norm = h < num_heads ? rope.q_norm : rope.k_norm;
        rotate(heads + h * dim, dim, norm, rope.eps, rope.cos + angle, rope.sin + angle);
      }
      const int64_t slot = tokens.slots[token];
      if (slot < 0) continue;
      const int64_t block = slot / tokens.block_size;
      const int64_t offset = slot % tokens.block_size;
      const T* key = heads + num_heads * dim;
      for (int h = 0; h < num_kv_heads; ++h) {
        const int64_t place = ((block * num_kv_heads + h) * tokens.block_size + offset) * dim;
        std::memcpy(tokens.keys + place, key + h * dim, dim * sizeof(T));
        std::memcpy(tokens.values + place, key + (num_kv_heads + h) * dim, dim * sizeof(T));
      }
    }
  });
}

template void rope_cache<float>(const QkvTokens<float>&, const RopeNorm<float>&, int);
template void rope_cache<bfloat16>(const QkvTokens<bfloat16>&, const RopeNorm<bfloat16>&, int);

}  // namespace xrl::XRL_ISA
