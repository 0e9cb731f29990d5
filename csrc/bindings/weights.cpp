// What moves weights between processes: sums over bytes as they are copied, and counters in shared memory.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "address.h"
#include "bindings/bindings.h"
#include "check.h"
#include "cpu/checksum.h"
#include "cpu/steps.h"
#include "dispatch.h"

namespace py = pybind11;

namespace {

using py::arg;
using xrl::Address;
using xrl::at;

// The checksum of a tensor's bytes, which are copied to target on the way, where that is not 0.
uint64_t tensor_checksum(Address bytes, int64_t num_bytes, Address target, int num_threads) {
  xrl::check(num_bytes >= 0, "num_bytes must be >= 0");
  xrl::check(num_threads >= 1, "num_threads must be >= 1, got " + std::to_string(num_threads));
  py::gil_scoped_release release;
  const int64_t num_rows = (num_bytes + xrl::kChecksumRowBytes - 1) / xrl::kChecksumRowBytes;
  std::vector<uint64_t> rows(static_cast<std::size_t>(num_rows)), columns(xrl::kChecksumRowWords);
  // Threads of its own, not the team's: those would spin afterwards, in a process that has other things to do.
  const int64_t share = (num_rows + num_threads - 1) / num_threads;
  std::vector<std::vector<uint64_t>> columns_of(static_cast<std::size_t>(num_threads), columns);
  const auto sum_share = [&](int thread) {
    const int64_t first = std::min(num_rows, thread * share), start = first * xrl::kChecksumRowBytes;
    const int64_t length = std::min(num_bytes - start, share * xrl::kChecksumRowBytes);
    if (length <= 0) return;
    uint64_t* own_columns = columns_of[static_cast<std::size_t>(thread)].data();
    if (target == 0) {
      XRL_DISPATCH(add_sums, at<const char>(bytes) + start, length, rows.data() + first, own_columns);
    } else {
      XRL_DISPATCH(copy_whole_and_add_sums, at<const char>(bytes) + start, at<char>(target) + start, length,
                   rows.data() + first, own_columns);
    }
  };
  std::vector<std::thread> others;
  int started = 1;
  others.reserve(static_cast<std::size_t>(num_threads - 1));  // with threads in it, it must not fail to grow
  try {
    for (; started < num_threads; ++started) others.emplace_back(sum_share, started);
  } catch (const std::exception&) {  // no more threads are to be had, or no memory for one
  }
  sum_share(0);
  for (int thread = started; thread < num_threads; ++thread) sum_share(thread);
  for (std::thread& other : others) other.join();
  for (const std::vector<uint64_t>& each : columns_of) {
    for (std::size_t j = 0; j < columns.size(); ++j) columns[j] += each[j];
  }
  return xrl::mix_sums(rows.data(), num_rows, columns.data());
}

void copy_and_add_sums(Address source, Address target, int64_t offset, int64_t num_bytes,
                       const std::vector<std::tuple<int64_t, int64_t, int64_t>>& dimensions, Address rows,
                       Address columns) {
  xrl::check(dimensions.size() <= 3, "runs of bytes lie along 3 dimensions at most");
  bool whole_words = offset % 8 == 0 && num_bytes % 8 == 0;
  xrl::ByteRuns runs{num_bytes, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}};
  for (std::size_t i = 0; i < dimensions.size(); ++i) {
    std::tie(runs.sizes[i], runs.source_strides[i], runs.target_strides[i]) = dimensions[i];
    whole_words = whole_words && runs.target_strides[i] % 8 == 0;
  }
  xrl::check(whole_words && offset >= 0 && num_bytes >= 0, "offset, lengths and strides must be multiples of 8 bytes");
  py::gil_scoped_release release;
  XRL_DISPATCH(copy_and_add_sums, at<const char>(source), at<char>(target), offset, runs, at<uint64_t>(rows),
               at<uint64_t>(columns));
}

// The sum, modulo 2^64, of mix(checksum, hash) over tensors of (place in the sums, rows, hash of its name, dtype and
// shape).
uint64_t checksum_from_sums(const std::vector<Address>& shares,
                            const std::vector<std::tuple<int64_t, int64_t, uint64_t>>& tensors) {
  xrl::check(!shares.empty(), "there must be a share of the sums");
  py::gil_scoped_release release;
  uint64_t total = 0;
  std::vector<uint64_t> sums;
  for (const auto& [place, num_rows, hash] : tensors) {
    sums.assign(static_cast<std::size_t>(num_rows + xrl::kChecksumRowWords), 0);
    for (Address share : shares) {
      const uint64_t* of_rank = at<const uint64_t>(share) + place;
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += of_rank[i];
    }
    total += xrl::mix(xrl::mix_sums(sums.data(), num_rows, sums.data() + num_rows), hash);
  }
  return total;
}

void set_step(Address counter, int32_t step) { xrl::set_step(at<int32_t>(counter), step); }

bool wait_for_step(Address counter, int32_t step, double seconds) {
  constexpr double kLongest = 1e9;  // what clocks can count; a NaN is refused too
  xrl::check(seconds >= 0 && seconds <= kLongest, "seconds must be in [0, 1e9], got " + std::to_string(seconds));
  py::gil_scoped_release release;
  return xrl::wait_for_step(at<const int32_t>(counter), step, seconds);
}

}  // namespace

void xrl::bind_weights(py::module_& module) {
  module.def("tensor_checksum", &tensor_checksum, arg("bytes"), arg("num_bytes"), arg("target"), arg("num_threads"));
  module.def("copy_and_add_sums", &copy_and_add_sums, arg("source"), arg("target"), arg("offset"), arg("num_bytes"),
             arg("dimensions"), arg("rows"), arg("columns"));
  module.def("checksum_from_sums", &checksum_from_sums, arg("shares"), arg("tensors"));
  module.def("set_step", &::set_step, arg("counter"), arg("step"));
  module.def("wait_for_step", &::wait_for_step, arg("counter"), arg("step"), arg("seconds"));
}
