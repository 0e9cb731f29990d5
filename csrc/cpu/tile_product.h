// Products of small fp32 matrices that lie in the caches, in registers: C (+)= A B. All functions are static: this file
// is compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/strided_matrix.h"

namespace xrl {

constexpr int kProductRows = 6;
// As many sums as the registers hold: 24 of 32 with AVX-512, 12 of 16 with the others.
constexpr int kProductVectors = XRL_LANES == 16 ? 4 : 2;

// C[M, V lanes] = A[M, depth] B[depth, V lanes] + addend, where that isn't null; it may be C.
template <int M, int V>
static inline void tile_product(const StridedMatrix& a, const float* b, int64_t b_stride, int depth,
                                const float* addend, int64_t addend_stride, float* c, int64_t c_stride) {
  Lanes sums[M][V];
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) {
      sums[i][v] = addend == nullptr ? Lanes{} : load_lanes(addend + i * addend_stride + v * kLanes);
    }
  }
  // Every third row by a pointer: an address can add once or twice the stride, and pointers to all would not fit the
  // registers.
  const float* third[(M + 2) / 3];
  for (int i = 0; i < M; i += 3) third[i / 3] = a.data + i * a.row_stride;
  for (int k = 0; k < depth; ++k) {
    Lanes row[V];
    for (int v = 0; v < V; ++v) row[v] = load_lanes(b + v * kLanes);
    for (int i = 0; i < M; ++i) {
      const Lanes factor = all_lanes(third[i / 3][i % 3 * a.row_stride]);
      for (int v = 0; v < V; ++v) sums[i][v] += factor * row[v];
    }
    for (int i = 0; i < M; i += 3) third[i / 3] += a.column_stride;
    b += b_stride;
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) store_lanes(c + i * c_stride + v * kLanes, sums[i][v]);
  }
}

template <int M>
static inline void row_product(const StridedMatrix& a, const float* b, int64_t b_stride, int columns, int depth,
                               float* c, int64_t c_stride, bool adds) {
  const auto addend = [&](int j) { return adds ? c + j : nullptr; };
  int j = 0;
  for (; j + kProductVectors * kLanes <= columns; j += kProductVectors * kLanes) {
    tile_product<M, kProductVectors>(a, b + j, b_stride, depth, addend(j), c_stride, c + j, c_stride);
  }
  for (; j < columns; j += kLanes) {
    tile_product<M, 1>(a, b + j, b_stride, depth, addend(j), c_stride, c + j, c_stride);
  }
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns], with `columns` rounded up to whole vectors: B and C must be
// readable and writable that far.
static inline void product(StridedMatrix a, const float* b, int64_t b_stride, int rows, int columns, int depth,
                           float* c, int64_t c_stride, bool adds) {
  for (int i = 0; i < rows; i += kProductRows) {
    switch (std::min(kProductRows, rows - i)) {
      case 6:
        row_product<6>(a, b, b_stride, columns, depth, c, c_stride, adds);
        break;
      case 5:
        row_product<5>(a, b, b_stride, columns, depth, c, c_stride, adds);
        break;
      case 4:
        row_product<4>(a, b, b_stride, columns, depth, c, c_stride, adds);
        break;
      case 3:
        row_product<3>(a, b, b_stride, columns, depth, c, c_stride, adds);
        break;
      case 2:
        row_product<2>(a, b, b_stride, columns, depth, c, c_stride, adds);
        break;
      default:
        row_product<1>(a, b, b_stride, columns, depth, c, c_stride, adds);
    }
    a.data += kProductRows * a.row_stride;
    c += kProductRows * c_stride;
  }
}

}  // namespace xrl
