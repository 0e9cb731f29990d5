#include "cpu/qkv_rope.h"

#include <cmath>

#include "cpu/lanes.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

// V as in load_as: a float where half a head is not whole vectors.
template <typename V, typename T>
inline float inverse_rms_of(const T* head, int dim, float eps) {
  V squares = {};
  for (int d = 0; d < dim; d += width_of<V>) squares += load_as<V>(head + d) * load_as<V>(head + d);
  return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(dim) + eps);
}

template <typename V, typename T>
inline void rope_head(const T* head, const T* cosine, const T* sine, const T* weight, float eps, int dim, T* out) {
  const int half = dim / 2;
  const float scale = weight == nullptr ? 1.0f : inverse_rms_of<V>(head, dim, eps);
  for (int d = 0; d < half; d += width_of<V>) {
    V first = load_as<V>(head + d) * scale;
    V second = load_as<V>(head + half + d) * scale;
    if (weight != nullptr) {
      first *= load_as<V>(weight + d);
      second *= load_as<V>(weight + half + d);
    }
    store_as(out + d, first * load_as<V>(cosine + d) - second * load_as<V>(sine + d));
    store_as(out + half + d, second * load_as<V>(cosine + half + d) + first * load_as<V>(sine + half + d));
  }
}

// The rotation's transpose is the rotation back; then RMSNorm's gradient.
template <typename V, typename T>
inline void rope_head_backward(const T* head, const T* grad, const T* cosine, const T* sine, const T* weight, float eps,
                               int dim, T* grad_head, float* grad_weight) {
  const int half = dim / 2;
  if (weight == nullptr) {
    for (int d = 0; d < half; d += width_of<V>) {
      const V first = load_as<V>(grad + d);
      const V second = load_as<V>(grad + half + d);
      store_as(grad_head + d, first * load_as<V>(cosine + d) + second * load_as<V>(sine + half + d));
      store_as(grad_head + half + d, second * load_as<V>(cosine + half + d) - first * load_as<V>(sine + d));
    }
    return;
  }
  const float scale = inverse_rms_of<V>(head, dim, eps);
  V products = {};
  for (int d = 0; d < half; d += width_of<V>) {
    const V first = load_as<V>(grad + d);
    const V second = load_as<V>(grad + half + d);
    const V back_first = first * load_as<V>(cosine + d) + second * load_as<V>(sine + half + d);
    const V back_second = second * load_as<V>(cosine + half + d) - first * load_as<V>(sine + d);
    const V x_first = load_as<V>(head + d) * scale;
    const V x_second = load_as<V>(head + half + d) * scale;
    store_as(grad_weight + d, load_as<V>(grad_weight + d) + back_first * x_first);
    store_as(grad_weight + half + d, load_as<V>(grad_weight + half + d) + back_second * x_second);
    products += back_first * load_as<V>(weight + d) * x_first + back_second * load_as<V>(weight + half + d) * x_second;
  }
  const float projection = sum_lanes(products) / static_cast<float>(dim);
  for (int d = 0; d < half; d += width_of<V>) {
    const V first = load_as<V>(grad + d);
    const V second = load_as<V>(grad + half + d);
    const V back_first = first * load_as<V>(cosine + d) + second * load_as<V>(sine + half + d);
    const V back_second = second * load_as<V>(cosine + half + d) - first * load_as<V>(sine + d);
    const V x_first = load_as<V>(head + d) * scale;
    const V x_second = load_as<V>(head + half + d) * scale;
    store_as(grad_head + d, (back_first * load_as<V>(weight + d) - x_first * projection) * scale);
    store_as(grad_head + half + d, (back_second * load_as<V>(weight + half + d) - x_second * projection) * scale);
  }
}

template <typename V, typename T>
void forward(const T* mixed, const QkvShape& shape, const QkvRope<T>& rope, T* query, T* key,
                      int num_threads) {
  const int dim = shape.head_dim;
  for_ranges(shape.num_tokens, num_threads, [&](const Range& range) {
    for (int64_t token = range.first; token < range.last; ++token) {
      const T* cosine = rope.cosine + token * dim;
      const T* sine = rope.sine + token * dim;
      const T* head = mixed + token * shape.num_kv_heads * (shape.queries_per_key + 2) * dim;
      T* q = query + token * shape.num_kv_heads * shape.queries_per_key * dim;
      T* k = key + token * shape.num_kv_heads * dim;
      for (int g = 0; g < shape.num_kv_heads; ++g) {
        for (int i = 0; i < shape.queries_per_key; ++i, head += dim, q += dim) {
          rope_head<V>(head, cosine, sine, rope.q_weight, rope.eps, dim, q);
        }
        rope_head<V>(head, cosine, sine, rope.k_weight, rope.eps, dim, k);
        head += 2 * dim;
        k += dim;
      }
    }
  });
}

template <typename V, typename T>
void backward(const T* mixed, const T* grad_query, const T* grad_key, const QkvShape& shape,
                       const QkvRope<T>& rope, T* grad_mixed, float* grad_weights, int num_threads) {
  const int dim = shape.head_dim;
  for_parts(shape.num_tokens, num_threads, [&](int part, const Range& range) {
    float* grad_q_weight = grad_weights + part * 2 * dim;
    float* grad_k_weight = grad_q_weight + dim;
    for (int64_t token = range.first; token < range.last; ++token) {
      const T* cosine = rope.cosine + token * dim;
      const T* sine = rope.sine + token * dim;
      const int64_t first = token * shape.num_kv_heads * (shape.queries_per_key + 2) * dim;
      const T* head = mixed + first;
      T* grad_head = grad_mixed + first;
      const T* gq = grad_query + token * shape.num_kv_heads * shape.queries_per_key * dim;
      const T* gk = grad_key + token * shape.num_kv_heads * dim;
      for (int g = 0; g < shape.num_kv_heads; ++g) {
        for (int i = 0; i < shape.queries_per_key; ++i, head += dim, grad_head += dim, gq += dim) {
          rope_head_backward<V>(head, gq, cosine, sine, rope.q_weight, rope.eps, dim, grad_head, grad_q_weight);
        }
        rope_head_backward<V>(head, gk, cosine, sine, rope.k_weight, rope.eps, dim, grad_head, grad_k_weight);
        head += 2 * dim;
        grad_head += 2 * dim;
        gk += dim;
      }
    }
  });
}

inline bool halves_are_vectors(const QkvShape& shape) { return shape.head_dim / 2 % kLanes == 0; }

}  // namespace

template <typename T>
void qkv_rope_forward(const T* mixed, const QkvShape& shape, const QkvRope<T>& rope, T* query, T* key,
                      int num_threads) {
  const auto run = halves_are_vectors(shape) ? forward<Lanes, T> : forward<float, T>;
  run(mixed, shape, rope, query, key, num_threads);
}

template <typename T>
void qkv_rope_backward(const T* mixed, const T* grad_query, const T* grad_key, const QkvShape& shape,
                       const QkvRope<T>& rope, T* grad_mixed, float* grad_weights, int num_threads) {
  const auto run = halves_are_vectors(shape) ? backward<Lanes, T> : backward<float, T>;
  run(mixed, grad_query, grad_key, shape, rope, grad_mixed, grad_weights, num_threads);
}

#define XRL_INSTANTIATE(T)                                                                                       \
  template void qkv_rope_forward<T>(const T*, const QkvShape&, const QkvRope<T>&, T*, T*, int);                  \
  template void qkv_rope_backward<T>(const T*, const T*, const T*, const QkvShape&, const QkvRope<T>&, T*, float*, \
                                     int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
