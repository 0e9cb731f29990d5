// Whether what a kernel writes lies apart from what else it reads or writes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "address.h"

namespace xrl {

// Bytes of a tensor without gaps. No address: there is no such tensor.
struct Span {
  const char* name;
  Address start;
  int64_t num_bytes;
};

inline bool overlap(const Span& a, const Span& b) {
  if (a.start == 0 || b.start == 0 || a.num_bytes <= 0 || b.num_bytes <= 0) return false;
  return a.start < b.start + static_cast<Address>(b.num_bytes) && b.start < a.start + static_cast<Address>(a.num_bytes);
}

[[noreturn]] inline void refuse_overlap(const char* written, const char* other) {
  throw std::invalid_argument(std::string(written) + " is written and must not share memory with " + other);
}

// Each of `written` from the others and from each of `read`. Raises ValueError in Python.
inline void check_apart(std::initializer_list<Span> written, std::initializer_list<Span> read) {
  for (const Span* span = written.begin(); span != written.end(); ++span) {
    for (const Span* other = span + 1; other != written.end(); ++other) {
      if (overlap(*span, *other)) refuse_overlap(span->name, other->name);
    }
    for (const Span& other : read) {
      if (overlap(*span, other)) refuse_overlap(span->name, other.name);
    }
  }
}

// The same of two spans of which the second may also be the first itself.
inline void check_same_or_apart(const Span& written, const Span& other) {
  if (written.start != other.start && overlap(written, other)) refuse_overlap(written.name, other.name);
}

// A matrix of fp32 with gaps between its rows or columns.
struct MatrixSpan {
  const char* name;
  Address start;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  Span whole() const {
    if (rows <= 0 || columns <= 0) return {name, 0, 0};
    return {name, start, 4 * ((rows - 1) * row_stride + (columns - 1) * column_stride + 1)};
  }
};

// Of a matrix with contiguous rows and any other.
inline bool overlap(const MatrixSpan& out, const MatrixSpan& other) {
  if (!overlap(out.whole(), other.whole())) return false;
  const int64_t stride = out.row_stride;
  if (out.rows == 1 || other.rows == 1 || other.row_stride != stride) return true;
  if (other.columns > 1 && other.column_stride != 1) return true;
  // Some columns each of one wide matrix. Where those of the other begin in its rows, counted from those of out:
  const int64_t distance = (static_cast<int64_t>(other.start) - static_cast<int64_t>(out.start)) / 4;
  const int64_t first = (distance % stride + stride) % stride;
  return first < out.columns || first + other.columns > stride;
}

}  // namespace xrl
