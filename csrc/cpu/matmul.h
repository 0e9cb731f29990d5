// fp32 matrix products in blocks that stay in the caches. Every element is one sum over `depth`, from its first term to
// its last, whatever the shape, the number of rows or of threads: a row's result does not depend on its company.
#pragma once

#include <cstdint>

#include "cpu/strided_matrix.h"

namespace xrl {

// A weight in the order a product reads it: panels of columns, `packed_columns` of them in all. With `is_gated` it is
// two matrices of `columns` columns each, the gate's before the other's, whose panels alternate.
struct PackedWeight {
  const float* data;
  int64_t depth;
  int64_t columns;
  bool is_gated;
};

// What a product is added to: row r, column c at data[r * row_stride + c]; null is nothing. A bias has row stride 0.
struct Addend {
  const float* data;
  int64_t row_stride;

  Addend from(int64_t row, int64_t column) const {
    return {data == nullptr ? nullptr : data + row * row_stride + column, row_stride};
  }
};

}  // namespace xrl

#define XRL_DECLARE_MATMUL(ISA)                                                                                      \
  namespace xrl::ISA {                                                                                               \
  /* c[rows, columns] = a[rows, depth] b[depth, columns] + addend, which may be c */                                 \
  void matmul(const StridedMatrix& a, const StridedMatrix& b, const Addend& addend, int64_t rows, int64_t columns,   \
              int64_t depth, float* c, int64_t c_stride, int num_threads);                                           \
  /* floats that a packed weight takes */                                                                            \
  void packed_size(int64_t depth, int64_t columns, bool is_gated, int64_t* size);                                    \
  /* b[depth, columns], or [depth, 2 * columns] of a gated weight */                                                 \
  void pack_weight(const StridedMatrix& b, int64_t depth, int64_t columns, bool is_gated, float* packed,             \
                   int num_threads);                                                                                 \
  /* c[rows, columns] = a[rows, depth] b + addend; of a gated weight SwiGLU of the two products, without addend */   \
  void packed_matmul(const StridedMatrix& a, const PackedWeight& b, const Addend& addend, int64_t rows, float* c,    \
                     int64_t c_stride, int num_threads);                                                             \
  }

XRL_DECLARE_MATMUL(scalar)
XRL_DECLARE_MATMUL(avx2)
XRL_DECLARE_MATMUL(avx512)
