#include "cpu/matmul.h"

#include <algorithm>
#include <cstring>

#include "cpu/aligned_floats.h"
#include "cpu/matmul_tiles.h"
#include "cpu/swiglu.h"
#include "team.h"

namespace xrl::XRL_ISA {
void matmul(const StridedMatrix& a, const StridedMatrix& b, const Addend& addend, int64_t rows, int64_t columns,
            int64_t depth, float* c, int64_t c_stride, int num_threads) {
  if (rows == 0 || columns == 0) return;
  const bool in_place = has_panels(b, columns);
  const int64_t widest = std::min<int64_t>(kBlockColumns, round_up(columns, kPanel));
  const Floats block = in_place ? nullptr : make_floats(widest * std::clamp<int64_t>(depth, 1, kBlockDepth));
  const Split split(rows, columns, std::max(num_threads, 1));
  const int64_t width = in_place ? kBlockColumns * split.column_parts : kBlockColumns;
  for (int64_t column = 0; column < columns; column += width) {
    const int64_t block_columns = std::min<int64_t>(width, columns - column);
    const int64_t num_panels = (block_columns + kPanel - 1) / kPanel;
    int64_t k = 0;
    do {  // a block after the other: the sums of one are what the next one's are added to
      const int block_depth = static_cast<int>(std::min<int64_t>(kBlockDepth, depth - k));
      Panels panels = panels_in_place(b.from(k, column));
      if (!in_place) {
        panels = panels_packed(block.get(), block_depth);
        for_ranges(num_panels, num_threads, [&](const Range& range) {
          for (int64_t p = range.first; p < range.last; ++p) {
            pack_panel(b.from(k, column + p * kPanel), panel_columns(p * kPanel, block_columns), block_depth,
                       block.get() + p * kPanel * block_depth);
          }
        });
      }
      Turns turns(split, kChunkRows);
      run_on_team(num_threads, [&](int thread) {
        const Floats copies = room_for_copies(a);
        for (Turn turn; turns.take(thread, turn);) {
          const Range own = split.columns(num_panels, turn.owner);
          const int64_t first = own.first * kPanel;
          float* place = c + turn.rows.first * c_stride + column + first;
          const Addend start = k > 0 ? Addend{place, c_stride} : addend.from(turn.rows.first, column + first);
          chunk_times_panels(a.from(turn.rows.first, k), panels.from(0, own.first), start, turn.rows.size(),
                             std::min(own.last * kPanel, block_columns) - first, block_depth, place, c_stride,
                             copies.get());
        }
      });
      k += kBlockDepth;
    } while (k < depth);
  }
}

void packed_size(int64_t depth, int64_t columns, bool is_gated, int64_t* size) {
  *size = depth * (is_gated ? 2 * round_up(columns, kLanes) : round_up(columns, kPanel));
}

void pack_weight(const StridedMatrix& b, int64_t depth, int64_t columns, bool is_gated, float* packed,
                 int num_threads) {
  const int64_t width = is_gated ? kLanes : kPanel;
  const int64_t num_panels = (columns + width - 1) / width;
  for_ranges(num_panels, num_threads, [&](const Range& range) {
    for (int64_t p = range.first; p < range.last; ++p) {
      float* panel = packed + p * kPanel * depth;
      const int count = static_cast<int>(std::min(width, columns - p * width));
      if (is_gated) {
        pack_vector(b.from(0, p * width), count, static_cast<int>(depth), panel);
        pack_vector(b.from(0, columns + p * width), count, static_cast<int>(depth), panel + kLanes);
      } else {
        pack_panel(b.from(0, p * width), count, static_cast<int>(depth), panel);
      }
    }
  });
}

namespace {

// SwiGLU of the products with gated panels, whose lower half is the gate's.
void gated_product(const StridedMatrix& a, const Panels& b, int64_t rows, int64_t columns, int64_t depth, float* c,
                   int64_t c_stride, float* copy) {
  alignas(64) float sums[kTileRows * kPanel];
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t num_columns = std::min<int64_t>(kLanes, columns - column);
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int count = tile_rows(row, rows);
      int64_t k = 0;
      do {
        const int block_depth = static_cast<int>(std::min<int64_t>(kBlockDepth, depth - k));
        const StridedMatrix from = readable(a.from(row, k), count, block_depth, copy);
        tile_of_rows<kTileRows>(count, from, b.from(k, column / kLanes), block_depth, {k > 0 ? sums : nullptr, kPanel},
                                sums, kPanel);
        k += kBlockDepth;
      } while (k < depth);
      for (int i = 0; i < count; ++i) {
        const float* gate = sums + i * kPanel;
        const Lanes out = swiglu(load_lanes(gate), load_lanes(gate + kLanes));
        std::memcpy(c + (row + i) * c_stride + column, &out, sizeof(float) * num_columns);
      }
    }
  }
}

}  // namespace

void packed_matmul(const StridedMatrix& a, const PackedWeight& b, const Addend& addend, int64_t rows, float* c,
                   int64_t c_stride, int num_threads) {
  if (rows == 0) return;
  const int64_t width = b.is_gated ? kLanes : kPanel;
  const int64_t num_panels = (b.columns + width - 1) / width;
  const Split split(rows, num_panels * kPanel, std::max(num_threads, 1));
  Turns turns(split, kChunkRows);
  run_on_team(num_threads, [&](int thread) {
    const Floats copies = room_for_copies(a);
    for (Turn turn; turns.take(thread, turn);) {
      const Range own = split.columns(num_panels, turn.owner);
      const int64_t row = turn.rows.first;
      const int64_t first = own.first * width;
      const int64_t columns = std::min(own.last * width, b.columns) - first;
      const Panels panels = panels_packed(b.data, b.depth).from(0, own.first);
      float* place = c + row * c_stride + first;
      if (b.is_gated) {
        gated_product(a.from(row, 0), panels, turn.rows.size(), columns, b.depth, place, c_stride, copies.get());
      } else {
        chunk_times_deep_panels(a.from(row, 0), panels, addend.from(row, first), turn.rows.size(), columns, b.depth,
                                place, c_stride, copies.get());
      }
    }
  });
}

}  // namespace xrl::XRL_ISA
