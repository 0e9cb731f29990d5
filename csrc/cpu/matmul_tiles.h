// What products in blocks are made of: tiles of rows, panels of columns. Blocks as in BLIS (doi:10.1145/2764454): a
// panel of B's columns is read from L2 for each tile of A's rows, which stays in L1, while the tile of C is summed in
// registers. All functions are static: this file is compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/aligned_floats.h"
#include "cpu/matmul.h"
#include "cpu/tile_product.h"

namespace xrl {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;  // columns
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // with kPanelVectors, as many sums as the registers hold
constexpr int kBlockDepth = 384;
constexpr int kBlockColumns = 512;  // a block of B, depth x columns, stays in L2
// Rows this far apart fall into the same few lines of L1 and drive each other out.
constexpr int64_t kAliasingStride = 1024;
constexpr int kCopyStride = kBlockDepth + 16;

static_assert(kBlockColumns % kPanel == 0 && kBlockDepth % kLanes == 0);

template <int M>
static inline void tile_of_rows(int rows, const StridedMatrix& a, const float* panel, int depth, const Addend& addend,
                                float* c, int64_t c_stride) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of_rows<M - 1>(rows, a, panel, depth, addend, c, c_stride);
  }
  tile_product<M, kPanelVectors>(a, panel, kPanel, depth, addend.data, addend.row_stride, c, c_stride);
}

// c[rows, columns] = a panel + addend for one tile of rows and one panel, of which only `columns` may be touched.
static inline void tile(int rows, int columns, const StridedMatrix& a, const float* panel, int depth,
                        const Addend& addend, float* c, int64_t c_stride) {
  if (columns == kPanel) return tile_of_rows<kTileRows>(rows, a, panel, depth, addend, c, c_stride);
  alignas(64) float sums[kTileRows * kPanel] = {};
  const size_t width = sizeof(float) * columns;
  if (addend.data != nullptr) {
    for (int i = 0; i < rows; ++i) std::memcpy(sums + i * kPanel, addend.data + i * addend.row_stride, width);
  }
  tile_of_rows<kTileRows>(rows, a, panel, depth, {sums, kPanel}, sums, kPanel);
  for (int i = 0; i < rows; ++i) std::memcpy(c + i * c_stride, sums + i * kPanel, width);
}

// A tile of A as the product wants it: where it stands, or copied into `copy` where it cannot be read fast from there.
static inline StridedMatrix readable(const StridedMatrix& a, int rows, int depth, float* copy) {
  if (a.column_stride == 1) {
    if (rows == 1 || a.row_stride % kAliasingStride != 0) return a;
    for (int i = 0; i < rows; ++i) {
      std::memcpy(copy + i * kCopyStride, a.data + i * a.row_stride, sizeof(float) * depth);
    }
    return {copy, kCopyStride, 1};
  }
  if (a.row_stride == 1 && rows == kTileRows) {
    for (int k = 0; k < depth; ++k) {
      std::memcpy(copy + k * kTileRows, a.data + k * a.column_stride, sizeof(float) * kTileRows);
    }
  } else {
    for (int k = 0; k < depth; ++k) {
      for (int i = 0; i < rows; ++i) copy[k * kTileRows + i] = a.data[i * a.row_stride + k * a.column_stride];
    }
  }
  return {copy, 1, kTileRows};
}

constexpr int64_t kCopySize = std::max<int64_t>(kTileRows * kCopyStride, kTileRows * kBlockDepth);

// Two registers' numbers by turns, the first halves' and the second halves'.
static inline void interleave(Lanes a, Lanes b, Lanes& low, Lanes& high) {
  LaneBits first, second;
  for (int lane = 0; lane < kLanes / 2; ++lane) {
    first[2 * lane] = lane;
    first[2 * lane + 1] = lane + kLanes;
    second[2 * lane] = lane + kLanes / 2;
    second[2 * lane + 1] = lane + kLanes / 2 + kLanes;
  }
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, second);
}

// Of kLanes x kLanes numbers: log2(kLanes) perfect shuffles.
static inline void transpose(Lanes (&rows)[kLanes]) {
  for (int size = 1; size < kLanes; size *= 2) {
    Lanes shuffled[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], shuffled[2 * i], shuffled[2 * i + 1]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
  }
}

// One vector of columns of b, for all of its depth, into a panel; past `columns` it is filled up with zeros.
static inline void pack_vector(const StridedMatrix& b, int columns, int depth, float* panel) {
  int k = 0;
  if (columns == kLanes && b.column_stride == 1) {
    for (; k < depth; ++k) store_lanes(panel + k * kPanel, load_lanes(b.data + k * b.row_stride));
  } else if (columns == kLanes && b.row_stride == 1) {
    for (; k + kLanes <= depth; k += kLanes) {
      Lanes square[kLanes];
      for (int j = 0; j < kLanes; ++j) square[j] = load_lanes(b.data + j * b.column_stride + k);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store_lanes(panel + (k + i) * kPanel, square[i]);
    }
  }
  for (; k < depth; ++k) {
    for (int j = 0; j < kLanes; ++j) {
      panel[k * kPanel + j] = j < columns ? b.data[k * b.row_stride + j * b.column_stride] : 0.0f;
    }
  }
}

static inline void pack_panel(const StridedMatrix& b, int columns, int depth, float* panel) {
  for (int v = 0; v < kPanelVectors; ++v) {
    const int width = std::clamp(columns - v * kLanes, 0, kLanes);
    pack_vector(b.from(0, v * kLanes), width, depth, panel + v * kLanes);
  }
}

static inline int tile_rows(int64_t first, int64_t rows) {
  return static_cast<int>(std::min<int64_t>(kTileRows, rows - first));
}

static inline int panel_columns(int64_t first, int64_t columns) {
  return static_cast<int>(std::min<int64_t>(kPanel, columns - first));
}

// One tile of rows times the panels [first, last).
static inline void product_of_panels(const StridedMatrix& a, const PackedWeight& b, const Addend& addend, int rows,
                                     int64_t first, int64_t last, float* c, int64_t c_stride, float* copy) {
  int64_t k = 0;
  do {
    const int depth = static_cast<int>(std::min<int64_t>(kBlockDepth, b.depth - k));
    const StridedMatrix from = readable(a.from(0, k), rows, depth, copy);
    for (int64_t p = first; p < last; ++p) {
      float* place = c + p * kPanel;
      Addend start{place, c_stride};
      if (k == 0) start = {addend.data == nullptr ? nullptr : addend.data + p * kPanel, addend.row_stride};
      tile(rows, panel_columns(p * kPanel, b.columns), from, b.data + (p * b.depth + k) * kPanel, depth, start, place,
           c_stride);
    }
    k += kBlockDepth;
  } while (k < b.depth);
}

}  // namespace xrl
