#include "cpu/layer_ops.h"

#include <cmath>

#include "cpu/lanes.h"
#include "cpu/swiglu.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

template <typename V, typename T>
inline void swiglu_at(const T* gate, const T* up, T* out) {
  store_as(out, swiglu(load_as<V>(gate), load_as<V>(up)));
}

}  // namespace

template <typename T>
void swiglu_forward(const T* x, int64_t num_rows, int64_t size, T* out, int num_threads) {
  for_ranges(num_rows, num_threads, [&](const Range& range) {
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* gate = x + row * 2 * size;
      const T* up = gate + size;
      T* y = out + row * size;
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) swiglu_at<Lanes>(gate + i, up + i, y + i);
      for (; i < size; ++i) swiglu_at<float>(gate + i, up + i, y + i);
    }
  });
}

template <typename T>
void swiglu_backward(const T* x, const T* grad, int64_t num_rows, int64_t size, T* grad_x, T* out,
                     int num_threads) {
  for_ranges(num_rows, num_threads, [&](const Range& range) {
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = x + row * 2 * size;
      const T* dy = grad + row * size;
      T* dx = grad_x + row * 2 * size;
      if (out == nullptr) {
        swiglu_gradient_row<false, T>(in, dy, size, dx, dx);
      } else {
        swiglu_gradient_row<true>(in, dy, size, dx, out + row * size);
      }
    }
  });
}

template <typename T>
void rms_norm_forward(const T* x, const T* weight, int64_t num_rows, int64_t size, float eps, T* out,
                      float* inverse_rms, int num_threads) {
  for_ranges(num_rows, num_threads, [&](const Range& range) {
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = x + row * size;
      T* y = out + row * size;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < size; ++i) squares += load(in[i]) * load(in[i]);
      const float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
      inverse_rms[row] = scale;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) store(y + i, load(in[i]) * scale * load(weight[i]));
    }
  });
}

template <typename T>
void rms_norm_backward(const T* x, const T* weight, const float* inverse_rms, const T* grad, const T* addend,
                       int64_t num_rows, int64_t size, T* grad_x, float* grad_weight, int num_threads) {
  for_parts(num_rows, num_threads, [&](int part, const Range& range) {
    float* sums = grad_weight + part * size;
    for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = x + row * size;
      const T* dy = grad + row * size;
      T* dx = grad_x + row * size;
      const float scale = inverse_rms[row];
      float projection = 0.0f;  // of the incoming gradient on the normalised row
#pragma omp simd reduction(+ : projection)
      for (int64_t i = 0; i < size; ++i) projection += load(dy[i]) * load(weight[i]) * load(in[i]);
      projection *= scale * scale / static_cast<float>(size);
      const auto store_gradients = [&](auto start) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float value = load(in[i]);
          const float d = load(dy[i]);
          sums[i] += d * value * scale;
          store(dx + i, start(i) + scale * (d * load(weight[i]) - value * projection));
        }
      };
      if (addend == nullptr) {
        store_gradients([](int64_t) { return 0.0f; });
      } else {
        store_gradients([&](int64_t i) { return load(addend[row * size + i]); });
      }
    }
  });
}

template <typename T>
void rotary(const T* x, const T* cosine, const T* sine, int64_t num_tokens, int64_t num_heads, int64_t dim,
            float sign, T* out, int num_threads) {
  const int64_t half = dim / 2;
  for_ranges(num_tokens, num_threads, [&](const Range& range) {
    for (int64_t token = range.first; token < range.last; ++token) {
      const T* c = cosine + token * dim;
      const T* s = sine + token * dim;
      for (int64_t head = 0; head < num_heads; ++head) {
        const T* in = x + (token * num_heads + head) * dim;
        T* y = out + (token * num_heads + head) * dim;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const float first = load(in[i]);
          const float second = load(in[i + half]);
          store(y + i, first * load(c[i]) - second * sign * load(s[i]));
          store(y + i + half, second * load(c[i + half]) + first * sign * load(s[i + half]));
        }
      }
    }
  });
}

#define XRL_INSTANTIATE(T)                                                                                          \
  template void swiglu_forward<T>(const T*, int64_t, int64_t, T*, int);                                             \
  template void swiglu_backward<T>(const T*, const T*, int64_t, int64_t, T*, T*, int);                              \
  template void rms_norm_forward<T>(const T*, const T*, int64_t, int64_t, float, T*, float*, int);                  \
  template void rms_norm_backward<T>(const T*, const T*, const float*, const T*, const T*, int64_t, int64_t, T*,    \
                                     float*, int);                                                                  \
  template void rotary<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, float, T*, int);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(bfloat16)

}  // namespace xrl::XRL_ISA
