// What products in blocks are made of: tiles of rows, panels of columns. Blocks as in BLIS (doi:10.1145/2764454): a
// panel of B's columns and a chunk of tiles of A's rows come from L2, while one tile of C is summed in registers. All
// functions are static: this file is compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/aligned_floats.h"
#include "cpu/matmul.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"
#include "team.h"

namespace xrl {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;  // columns
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // with kPanelVectors, as many sums as the registers hold
constexpr int kBlockDepth = 384;
constexpr int kBlockColumns = 512;  // a block of B, depth x columns, stays in L2
constexpr int kChunkTiles = 4;      // that take turns with a panel
// Rows this far apart fall into the same few lines of L1 and drive each other out.
constexpr int64_t kAliasingStride = 1024;
constexpr int kCopyStride = kBlockDepth + 16;

static_assert(kBlockColumns % kPanel == 0 && kBlockDepth % kLanes == 0);

namespace {  // a copy of these for each instruction set, as of the functions

// B in panels: row k of panel p is at data + p * panel_stride + k * row_stride.
struct Panels {
  const float* data;
  int64_t panel_stride;
  int64_t row_stride;

  Panels from(int64_t row, int64_t panel) const {
    return {data + panel * panel_stride + row * row_stride, panel_stride, row_stride};
  }
};

}  // namespace

// Whether panels can be read fast from where they stand, in b[depth, columns].
static inline bool has_panels(const StridedMatrix& b, int64_t columns) {
  return b.column_stride == 1 && columns % kPanel == 0 && b.row_stride % kAliasingStride != 0;
}

static inline Panels panels_in_place(const StridedMatrix& b) { return {b.data, kPanel, b.row_stride}; }

static inline Panels panels_packed(const float* data, int64_t depth) { return {data, kPanel * depth, kPanel}; }

template <int M>
static inline void tile_of_rows(int rows, const StridedMatrix& a, const Panels& b, int depth, const Addend& addend,
                                float* c, int64_t c_stride) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of_rows<M - 1>(rows, a, b, depth, addend, c, c_stride);
  }
  tile_product<M, kPanelVectors>(a, b.data, b.row_stride, depth, addend.data, addend.row_stride, c, c_stride);
}

// c[rows, columns] = a b + addend for one tile of rows and one panel, of which only `columns` may be touched.
static inline void tile(int rows, int columns, const StridedMatrix& a, const Panels& b, int depth,
                        const Addend& addend, float* c, int64_t c_stride) {
  if (columns == kPanel) return tile_of_rows<kTileRows>(rows, a, b, depth, addend, c, c_stride);
  alignas(64) float sums[kTileRows * kPanel] = {};
  const size_t width = sizeof(float) * columns;
  if (addend.data != nullptr) {
    for (int i = 0; i < rows; ++i) std::memcpy(sums + i * kPanel, addend.data + i * addend.row_stride, width);
  }
  tile_of_rows<kTileRows>(rows, a, b, depth, {sums, kPanel}, sums, kPanel);
  for (int i = 0; i < rows; ++i) std::memcpy(c + i * c_stride, sums + i * kPanel, width);
}

// Whether tiles of A cannot be read fast from where they stand.
static inline bool must_copy(const StridedMatrix& a) {
  if (a.column_stride != 1 && a.row_stride != 1) return true;
  return (a.column_stride == 1 ? a.row_stride : a.column_stride) % kAliasingStride == 0;
}

// A tile of A as the product wants it: where it stands, or copied into `copy`.
static inline StridedMatrix readable(const StridedMatrix& a, int rows, int depth, float* copy) {
  if (!must_copy(a) || (rows == 1 && a.column_stride == 1)) return a;
  if (a.column_stride == 1) {
    for (int i = 0; i < rows; ++i) {
      std::memcpy(copy + i * kCopyStride, a.data + i * a.row_stride, sizeof(float) * depth);
    }
    return {copy, kCopyStride, 1};
  }
  for (int k = 0; k < depth; ++k) {
    for (int i = 0; i < rows; ++i) copy[k * kTileRows + i] = a.data[i * a.row_stride + k * a.column_stride];
  }
  return {copy, 1, kTileRows};
}

constexpr int64_t kCopySize = std::max<int64_t>(kTileRows * kCopyStride, kTileRows * kBlockDepth);

// Room for the copies of a chunk, if there will be any.
static inline Floats room_for_copies(const StridedMatrix& a) {
  return must_copy(a) ? make_floats(kChunkTiles * kCopySize) : nullptr;
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

constexpr int64_t kChunkRows = kChunkTiles * kTileRows;
constexpr int kLineFloats = 16;

// What the sums of the tile after this one begin with, or else where they will be written: lines far apart, which
// hardware prefetchers do not foresee.
static inline void prefetch_sums(const Addend& addend, const float* c, int64_t c_stride, int rows) {
  const Addend read = addend.data == nullptr ? Addend{c, c_stride} : addend;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kPanel; j += kLineFloats) __builtin_prefetch(read.data + i * read.row_stride + j);
  }
}

// A share of the chunk after this one, where A is transposed and each step of the depth is on a page of its own.
static inline void prefetch_chunk(const StridedMatrix& a, int64_t tile, int depth) {
  for (int64_t k = tile * depth / kChunkTiles; k < (tile + 1) * depth / kChunkTiles; ++k) {
    const float* rows = a.data + kChunkRows + k * a.column_stride;
    for (int i = 0; i < kChunkRows; i += kLineFloats) __builtin_prefetch(rows + i, 0, 2);
  }
}

// c[rows, columns] = a b + addend for a chunk of rows, with `depth` of at most kBlockDepth.
static inline void chunk_times_panels(const StridedMatrix& a, const Panels& b, const Addend& addend, int64_t rows,
                                      int64_t columns, int depth, float* c, int64_t c_stride, float* copies) {
  StridedMatrix tiles[kChunkTiles];
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t t = row / kTileRows;
    float* copy = copies == nullptr ? nullptr : copies + t * kCopySize;
    tiles[t] = readable(a.from(row, 0), tile_rows(row, rows), depth, copy);
  }
  for (int64_t column = 0; column < columns; column += kPanel) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      float* place = c + row * c_stride + column;
      const bool is_last_tile = row + kTileRows >= rows;
      const int64_t next_row = is_last_tile ? 0 : row + kTileRows;
      const int64_t next_column = is_last_tile ? column + kPanel : column;
      if (next_column < columns) {
        prefetch_sums(addend.from(next_row, next_column), c + next_row * c_stride + next_column, c_stride,
                      tile_rows(next_row, rows));
      }
      const bool is_last_panel = column + kPanel >= columns;
      if (is_last_panel && a.row_stride == 1 && rows == kChunkRows) prefetch_chunk(a, row / kTileRows, depth);
      tile(tile_rows(row, rows), panel_columns(column, columns), tiles[row / kTileRows], b.from(0, column / kPanel),
           depth, addend.from(row, column), place, c_stride);
    }
  }
}

// The same for any depth.
static inline void chunk_times_deep_panels(const StridedMatrix& a, const Panels& b, const Addend& addend, int64_t rows,
                                           int64_t columns, int64_t depth, float* c, int64_t c_stride, float* copies) {
  int64_t k = 0;
  do {
    const int block_depth = static_cast<int>(std::min<int64_t>(kBlockDepth, depth - k));
    chunk_times_panels(a.from(0, k), b.from(k, 0), k == 0 ? addend : Addend{c, c_stride}, rows, columns, block_depth, c,
                       c_stride, copies);
    k += kBlockDepth;
  } while (k < depth);
}

namespace {

// Which rows and which columns a team's threads compute: those of one call as those of the next, because what a thread
// has written is near it, and may be far from the others (cores that share no L3).
class Split {
 public:
  Split(int64_t rows, int64_t columns, int num_threads) : num_threads(num_threads), rows_(rows) {
    int64_t lowest = INT64_MAX;
    for (int64_t parts = 1; parts <= num_threads; ++parts) {
      if (num_threads % parts != 0) continue;
      const int64_t my_rows = (rows * parts + num_threads - 1) / num_threads;
      const int64_t my_columns = (columns + parts - 1) / parts;
      // A panel costs its product with each row, of which less than a tile take as long as one; reading a row or a
      // column costs about as much as a product.
      const int64_t cost = std::max<int64_t>(my_rows, kTileRows) * ((my_columns + kPanel - 1) / kPanel) + my_rows +
                           my_columns;
      if (cost < lowest) {
        lowest = cost;
        column_parts = parts;
      }
    }
  }

  Range rows(int64_t thread) const { return part(rows_, thread / column_parts, num_threads / column_parts); }
  // Of `count` columns or panels.
  Range columns(int64_t count, int64_t thread) const { return part(count, thread % column_parts, column_parts); }

  int num_threads;
  int64_t column_parts = 1;

 private:
  static Range part(int64_t count, int64_t index, int64_t num_parts) {
    return {count * index / num_parts, count * (index + 1) / num_parts};
  }

  int64_t rows_;
};

// Some rows of a thread's part, for whoever computes them.
struct Turn {
  int owner;
  Range rows;
};

// Each thread takes its own rows, some at a time, and then what others have left.
class Turns {
 public:
  Turns(const Split& split, int64_t num_rows) : split_(split), num_rows_(num_rows), shares_(split.num_threads) {}

  // False when no rows are left.
  bool take(int thread, Turn& turn) {
    const auto num_turns = [this](int owner) { return (split_.rows(owner).size() + num_rows_ - 1) / num_rows_; };
    int64_t number;
    if (!shares_.take(thread, num_turns, turn.owner, number)) return false;
    const Range rows = split_.rows(turn.owner);
    const int64_t first = rows.first + number * num_rows_;
    turn.rows = {first, std::min(first + num_rows_, rows.last)};
    return true;
  }

 private:
  const Split& split_;
  int64_t num_rows_;
  Shares shares_;
};

}  // namespace

}  // namespace xrl
