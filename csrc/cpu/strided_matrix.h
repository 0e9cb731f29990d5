#pragma once

#include <cstdint>

namespace xrl {

// A matrix whose element (row, column) stands at data[row * row_stride + column * column_stride].
struct StridedMatrix {
  const float* data;
  int64_t row_stride;
  int64_t column_stride;

  StridedMatrix from(int64_t row, int64_t column) const {
    return {data + row * row_stride + column * column_stride, row_stride, column_stride};
  }
};

}  // namespace xrl
