#include "cpu/qkv_rope.h"

#include <omp.h>

#include <cmath>

#include "cpu/lanes.h"

namespace xrl::XRL_ISA {
namespace {


template <typename T>
inline float inverse_rms_of(const T* head, int dim, float eps) {
  Lanes squares = {};
  for (int d = 0; d < dim; d += kLanes) squares += load_lanes(head + d) * load_lanes(head + d);
  return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(dim) + eps);
}

template <typename T>
inline void rope_head(const T* head, const T* cosine, const T* sine, const T* weight, float eps, int dim, T* out) {
  const int half = dim / 2;
  const float scale = weight == nullptr ? 1.0f : inverse_rms_of(head, dim, eps);
  for (int d = 0; d < half; d += kLanes) {
    Lanes first = load_lanes(head + d) * scale;
    Lanes second = load_lanes(head + half + d) * scale;
    if (weight != nullptr) {
      first *= load_lanes(weight + d);
      second *= load_lanes(weight + half + d);
    }
    store_lanes(out + d, first * load_lanes(cosine + d) - second * load_lanes(sine + d));
    store_lanes(out + half + d, second * load_lanes(cosine + half + d) + first * load_lanes(sine + half + d));
  }
}

// The rotation's transpose is the rotation back; then RMSNorm's gradient.
template <typename T>
inline void rope_head_backward(const T* head, const T* grad, const T* cosine, const T* sine, const T* weight, float eps,
                               int dim, T* grad_head, float* grad_weight) {
  const int half = dim / 2;
  if (weight == nullptr) {
    for (int d = 0; d < half; d += kLanes) {
      const Lanes first = load_lanes(grad + d);
      const Lanes second = load_lanes(grad + half + d);
      store_lanes(grad_head + d, first * load_lanes(cosine + d) + second * load_lanes(sine + half + d));
      store_lanes(grad_head + half + d, second * load_lanes(cosine + half + d) - first * load_lanes(sine + d));
    }
    return;
  }
  const float scale = inverse_rms_of(head, dim, eps);
  Lanes products = {};
  for (int d = 0; d < half; d += kLanes) {
    const Lanes first = load_lanes(grad + d);
    const Lanes second = load_lanes(grad + half + d);
    const Lanes back_first = first * load_lanes(cosine + d) + second * load_lanes(sine + half + d);
    const Lanes back_second = second * load_lanes(cosine + half + d) - first * load_lanes(sine + d);
    const Lanes x_first = load_lanes(head + d) * scale;
    const Lanes x_second = load_lanes(head + half + d) * scale;
    store_lanes(grad_weight + d, load_lanes(grad_weight + d) + back_first * x_first);
    store_lanes(grad_weight + half + d, load_lanes(grad_weight + half + d) + back_second * x_second);
    products += back_first * load_lanes(weight + d) * x_first + back_second * load_lanes(weight + half + d) * x_second;
  }
  const float projection = sum_lanes(products) / static_cast<float>(dim);
  for (int d = 0; d < half; d += kLanes) {
    const Lanes first = load_lanes(grad + d);
    const Lanes second = load_lanes(grad + half + d);
    const Lanes back_first = first * load_lanes(cosine + d) + second * load_lanes(sine + half + d);
    const Lanes back_second = second * load_lanes(cosine + half + d) - first * load_lanes(sine + d);
    const Lanes x_first = load_lanes(head + d) * scale;
    const Lanes x_second = load_lanes(head + half + d) * scale;
    store_lanes(grad_head + d, (back_first * load_lanes(weight + d) - x_first * projection) * scale);
    store_lanes(grad_head + half + d, (back_second * load_lanes(weight + half + d) - x_second * projection) * scale);
  }
}

}  // namespace

template <typename T>
void qkv_rope_forward(const T* mixed, const QkvShape& shape, const QkvRope<T>& rope, T* query, T* key,
                      int num_threads) {
  const int dim = shape.head_dim;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    const T* cosine = rope.cosine + token * dim;
    const T* sine = rope.sine + token * dim;
    const T* head = mixed + token * shape.num_kv_heads * (shape.queries_per_key + 2) * dim;
    T* q = query + token * shape.num_kv_heads * shape.queries_per_key * dim;
    T* k = key + token * shape.num_kv_heads * dim;
    for (int g = 0; g < shape.num_kv_heads; ++g) {
      for (int i = 0; i < shape.queries_per_key; ++i, head += dim, q += dim) {
        rope_head(head, cosine, sine, rope.q_weight, rope.eps, dim, q);
      }
      rope_head(head, cosine, sine, rope.k_weight, rope.eps, dim, k);
      head += 2 * dim;
      k += dim;
    }
  }
}

template <typename T>
void qkv_rope_backward(const T* mixed, const T* grad_query, const T* grad_key, const QkvShape& shape,
                       const QkvRope<T>& rope, T* grad_mixed, float* grad_weights, int num_threads) {
  const int dim = shape.head_dim;
#pragma omp parallel num_threads(num_threads)
  {
    float* grad_q_weight = grad_weights + omp_get_thread_num() * 2 * dim;
    float* grad_k_weight = grad_q_weight + dim;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      const T* cosine = rope.cosine + token * dim;
      const T* sine = rope.sine + token * dim;
      const int64_t first = token * shape.num_kv_heads * (shape.queries_per_key + 2) * dim;
      const T* head = mixed + first;
      T* grad_head = grad_mixed + first;
      const T* gq = grad_query + token * shape.num_kv_heads * shape.queries_per_key * dim;
      const T* gk = grad_key + token * shape.num_kv_heads * dim;
      for (int g = 0; g < shape.num_kv_heads; ++g) {
        for (int i = 0; i < shape.queries_per_key; ++i, head += dim, grad_head += dim, gq += dim) {
          rope_head_backward(head, gq, cosine, sine, rope.q_weight, rope.eps, dim, grad_head, grad_q_weight);
        }
        rope_head_backward(head, gk, cosine, sine, rope.k_weight, rope.eps, dim, grad_head, grad_k_weight);
        head += 2 * dim;
        grad_head += 2 * dim;
        gk += dim;
      }
    }
  }
}

#define XRL_INSTANTIATE(T)                                                                                       \
  template void qkv_rope_forward<T>(const T*, const QkvShape&, const QkvRope<T>&, T*, T*, int);                  \
  template void qkv_rope_backward<T>(const T*, const T*, const T*, const QkvShape&, const QkvRope<T>&, T*, float*, \
                                     int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
