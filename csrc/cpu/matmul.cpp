#include "cpu/matmul.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "cpu/aligned_floats.h"
#include "cpu/matmul_tiles.h"
#include "cpu/swiglu.h"

namespace xrl::XRL_ISA {
namespace {

// How many parts to cut the panels into, so that few tiles of rows still give every thread enough to do.
int64_t parts_of_panels(int64_t num_tiles, int64_t num_panels, int num_threads) {
  const int64_t wanted = 4 * num_threads;
  return num_tiles >= wanted || num_threads == 1 ? 1 : std::min(num_panels, (wanted + num_tiles - 1) / num_tiles);
}

}  // namespace

void matmul(const StridedMatrix& a, const StridedMatrix& b, int64_t rows, int64_t columns, int64_t depth, float* c,
            int64_t c_stride, bool adds, int num_threads) {
  if (rows == 0) return;
  const int64_t widest = std::min<int64_t>(kBlockColumns, round_up(columns, kPanel));
  const Floats block = make_floats(widest * std::clamp<int64_t>(depth, 1, kBlockDepth));
  const int64_t num_tiles = (rows + kTileRows - 1) / kTileRows;
#pragma omp parallel num_threads(num_threads)
  {
    const Floats copy = make_floats(kCopySize);
    for (int64_t column = 0; column < columns; column += kBlockColumns) {
      const int64_t block_columns = std::min<int64_t>(kBlockColumns, columns - column);
      const int64_t num_panels = (block_columns + kPanel - 1) / kPanel;
      const int64_t parts = parts_of_panels(num_tiles, num_panels, num_threads);
      int64_t k = 0;
      do {
        const int block_depth = static_cast<int>(std::min<int64_t>(kBlockDepth, depth - k));
#pragma omp for schedule(static)
        for (int64_t p = 0; p < num_panels; ++p) {
          pack_panel(b.from(k, column + p * kPanel), panel_columns(p * kPanel, block_columns), block_depth,
                     block.get() + p * kPanel * block_depth);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_tiles * parts; ++task) {
          const int64_t row = task / parts * kTileRows;
          const int64_t part = task % parts;
          const int count = tile_rows(row, rows);
          const StridedMatrix from = readable(a.from(row, k), count, block_depth, copy.get());
          for (int64_t p = num_panels * part / parts; p < num_panels * (part + 1) / parts; ++p) {
            float* place = c + row * c_stride + column + p * kPanel;
            const Addend addend{adds || k > 0 ? place : nullptr, c_stride};
            tile(count, panel_columns(p * kPanel, block_columns), from, block.get() + p * kPanel * block_depth,
                 block_depth, addend, place, c_stride);
          }
        }
        k += kBlockDepth;
      } while (k < depth);
    }
  }
}

void packed_size(int64_t depth, int64_t columns, bool is_gated, int64_t* size) {
  *size = depth * (is_gated ? 2 * round_up(columns, kLanes) : round_up(columns, kPanel));
}

void pack_weight(const StridedMatrix& b, int64_t depth, int64_t columns, bool is_gated, float* packed,
                 int num_threads) {
  const int64_t width = is_gated ? kLanes : kPanel;
  const int64_t num_panels = (columns + width - 1) / width;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t p = 0; p < num_panels; ++p) {
    float* panel = packed + p * kPanel * depth;
    const int count = static_cast<int>(std::min(width, columns - p * width));
    if (is_gated) {
      pack_vector(b.from(0, p * width), count, static_cast<int>(depth), panel);
      pack_vector(b.from(0, columns + p * width), count, static_cast<int>(depth), panel + kLanes);
    } else {
      pack_panel(b.from(0, p * width), count, static_cast<int>(depth), panel);
    }
  }
}

namespace {

void gated_product_of_panels(const StridedMatrix& a, const PackedWeight& b, int rows, int64_t first, int64_t last,
                             float* c, int64_t c_stride, float* copy) {
  alignas(64) float sums[kTileRows * kPanel];
  for (int64_t p = first; p < last; ++p) {
    int64_t k = 0;
    do {
      const int depth = static_cast<int>(std::min<int64_t>(kBlockDepth, b.depth - k));
      const StridedMatrix from = readable(a.from(0, k), rows, depth, copy);
      tile_of_rows<kTileRows>(rows, from, b.data + (p * b.depth + k) * kPanel, depth, {k > 0 ? sums : nullptr, kPanel},
                              sums, kPanel);
      k += kBlockDepth;
    } while (k < b.depth);
    const int64_t columns = std::min<int64_t>(kLanes, b.columns - p * kLanes);
    for (int i = 0; i < rows; ++i) {
      const float* gate = sums + i * kPanel;
      const Lanes out = swiglu(load_lanes(gate), load_lanes(gate + kLanes));
      std::memcpy(c + i * c_stride + p * kLanes, &out, sizeof(float) * columns);
    }
  }
}

}  // namespace

void packed_matmul(const StridedMatrix& a, const PackedWeight& b, const Addend& addend, int64_t rows, float* c,
                   int64_t c_stride, int num_threads) {
  if (rows == 0) return;
  const int64_t num_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t width = b.is_gated ? kLanes : kPanel;
  const int64_t num_panels = (b.columns + width - 1) / width;
  const int64_t parts = parts_of_panels(num_tiles, num_panels, num_threads);
#pragma omp parallel num_threads(num_threads)
  {
    const Floats copy = make_floats(kCopySize);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_tiles * parts; ++task) {
      const int64_t row = task / parts * kTileRows;
      const int64_t part = task % parts;
      const int64_t first = num_panels * part / parts;
      const int64_t last = num_panels * (part + 1) / parts;
      const StridedMatrix from = a.from(row, 0);
      if (b.is_gated) {
        gated_product_of_panels(from, b, tile_rows(row, rows), first, last, c + row * c_stride, c_stride, copy.get());
      } else {
        const Addend start{addend.data == nullptr ? nullptr : addend.data + row * addend.row_stride,
                           addend.row_stride};
        product_of_panels(from, b, start, tile_rows(row, rows), first, last, c + row * c_stride, c_stride, copy.get());
      }
    }
  }
}

}  // namespace xrl::XRL_ISA
