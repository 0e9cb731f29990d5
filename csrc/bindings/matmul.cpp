// Matrix products, of matrices where they stand and of weights packed once.
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "address.h"
#include "arguments.h"
#include "bindings/bindings.h"
#include "check.h"
#include "cpu/matmul.h"
#include "dispatch.h"
#include "memory_checks.h"

namespace py = pybind11;

namespace {

using py::arg;
using xrl::Address;
using xrl::at;

// (address, row_stride, column_stride)
using MatrixTuple = std::tuple<Address, int64_t, int64_t>;

xrl::StridedMatrix matrix(const MatrixTuple& tuple) {
  const auto& [data, row_stride, column_stride] = tuple;
  return {at<const float>(data), row_stride, column_stride};
}

// (address, row_stride)
using AddendTuple = std::tuple<Address, int64_t>;

xrl::Addend addend(const AddendTuple& tuple) { return {at<const float>(std::get<0>(tuple)), std::get<1>(tuple)}; }

void matmul(const MatrixTuple& a, const MatrixTuple& b, const AddendTuple& start, int64_t rows, int64_t columns,
            int64_t depth, Address c, int64_t c_stride, int num_threads) {
  xrl::check_sizes(rows, columns, num_threads);
  xrl::check_sizes(depth, columns, num_threads);
  const auto& [a_start, a_row_stride, a_column_stride] = a;
  const auto& [b_start, b_row_stride, b_column_stride] = b;
  const auto& [start_start, start_stride] = start;
  xrl::check(rows <= 1 || c_stride >= columns, "the rows of out must not overlap");
  const xrl::MatrixSpan out{"out", c, rows, columns, c_stride, 1};
  for (const xrl::MatrixSpan& factor : {xrl::MatrixSpan{"a", a_start, rows, depth, a_row_stride, a_column_stride},
                                        xrl::MatrixSpan{"b", b_start, depth, columns, b_row_stride, b_column_stride}}) {
    if (xrl::overlap(out, factor)) xrl::refuse_overlap("out", factor.name);
  }
  const bool adds_in_place = start_start == c && (start_stride == c_stride || rows == 1);
  if (!adds_in_place && xrl::overlap(out, {"addend", start_start, rows, columns, start_stride, 1})) {
    xrl::refuse_overlap("out", "addend");
  }
  py::gil_scoped_release release;
  XRL_DISPATCH(matmul, matrix(a), matrix(b), addend(start), rows, columns, depth, at<float>(c), c_stride, num_threads);
}

int64_t packed_size(int64_t depth, int64_t columns, bool is_gated) {
  int64_t size = 0;
  XRL_DISPATCH(packed_size, depth, columns, is_gated, &size);
  return size;
}

void pack_weight(const MatrixTuple& weight, int64_t depth, int64_t columns, bool is_gated, Address packed,
                 int num_threads) {
  xrl::check_sizes(depth, columns, num_threads);
  py::gil_scoped_release release;
  XRL_DISPATCH(pack_weight, matrix(weight), depth, columns, is_gated, at<float>(packed), num_threads);
}

void packed_matmul(Address a, int64_t a_stride, Address packed, int64_t depth, int64_t columns, bool is_gated,
                   const AddendTuple& start, int64_t rows, Address c, int64_t c_stride, int num_threads) {
  xrl::check_sizes(rows, columns, num_threads);
  xrl::check(std::get<0>(start) == 0 || !is_gated, "a gated product takes no addend");
  py::gil_scoped_release release;
  XRL_DISPATCH(packed_matmul, xrl::StridedMatrix{at<const float>(a), a_stride, 1},
               xrl::PackedWeight{at<const float>(packed), depth, columns, is_gated},
               addend(start), rows, at<float>(c), c_stride, num_threads);
}

}  // namespace

void xrl::bind_matmul(py::module_& module) {
  module.def("matmul", &matmul, arg("a"), arg("b"), arg("addend"), arg("rows"), arg("columns"), arg("depth"), arg("c"),
             arg("c_stride"), arg("num_threads"));
  module.def("packed_size", &packed_size, arg("depth"), arg("columns"), arg("is_gated"));
  module.def("pack_weight", &pack_weight, arg("weight"), arg("depth"), arg("columns"), arg("is_gated"), arg("packed"),
             arg("num_threads"));
  module.def("packed_matmul", &packed_matmul, arg("a"), arg("a_stride"), arg("packed"), arg("depth"), arg("columns"),
             arg("is_gated"), arg("addend"), arg("rows"), arg("c"), arg("c_stride"), arg("num_threads"));
}
