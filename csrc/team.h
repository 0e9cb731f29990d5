// Threads that share a kernel's work. The caller never waits for a thread that has not come: beside other programs a
// helper may be waiting for a core for milliseconds, many times as long as a kernel takes. It is waited for only while
// it has taken work and not finished it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace xrl {

using TeamBody = void (*)(const void* context, int thread);

// So many that no machine has more cores for one process; each costs memory in every kernel that sums up by thread.
constexpr int kMostThreads = 1024;

// Threads that kernels of this process use; 0 where nobody has said.
void set_num_threads(int count);
int num_threads();

// Runs body(context, 0) here, and body(context, i), 1 <= i < num_threads, on each helper that comes before that one
// returns; returns when all have returned. The body must take its work piece by piece, for as long as there is some:
// any of the threads may do all of it. Calls from a body, or while another thread has the helpers, run on the caller
// alone. Throws what a body has thrown, here or on a helper, after all have returned: part of the work is undone then.
void call_team(int num_threads, TeamBody body, const void* context);

namespace {  // a copy of these for each instruction set

template <typename Body>
void run_on_team(int num_threads, const Body& body) {
  if (num_threads <= 1) return body(0);
  call_team(num_threads, [](const void* context, int thread) { (*static_cast<const Body*>(context))(thread); }, &body);
}

// Some of the rows, columns or panels of a matrix.
struct Range {
  int64_t first;
  int64_t last;

  int64_t size() const { return last - first; }
};

// The part `index` of `count` rows in `num_parts` parts, of which the first ones may be longer by one.
inline Range part_of(int64_t count, int64_t index, int64_t num_parts) {
  const int64_t size = count / num_parts, longer = count % num_parts;
  const int64_t first = index * size + std::min(index, longer);
  return {first, first + size + (index < longer ? 1 : 0)};
}

// Counts up to `count`, each number for one thread.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}

  // False when none is left.
  bool take(int64_t& task) {
    task = taken_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  int64_t count_;
  std::atomic<int64_t> taken_{0};
};

// Pieces of work in one part for each thread. A thread takes the pieces of its own part, which are those that it had in
// the kernel before and are near it, and then what others have left, who may be late or have slower cores.
class Shares {
 public:
  explicit Shares(int num_threads) : num_threads_(num_threads), taken_(new Counter[num_threads]) {}

  // The next piece of some thread's part, of which num_pieces(owner) says how many it has; false when none is left.
  template <typename NumPieces>
  bool take(int thread, const NumPieces& num_pieces, int& owner, int64_t& piece) {
    for (int i = 0; i < num_threads_; ++i) {
      owner = (thread + i) % num_threads_;
      piece = taken_[owner].value.fetch_add(1, std::memory_order_relaxed);
      if (piece < num_pieces(owner)) return true;
    }
    return false;
  }

 private:
  struct alignas(64) Counter {  // in a line of its own
    std::atomic<int64_t> value{0};
  };

  int num_threads_;
  std::unique_ptr<Counter[]> taken_;
};

// body(range) for pieces of [0, count), in any order, on a team.
template <typename Body>
void for_ranges(int64_t count, int num_threads, const Body& body) {
  constexpr int64_t kPieces = 8;  // of a thread's part: so that a late thread keeps the others waiting for one only
  if (num_threads <= 1) return body(Range{0, count});
  Shares shares(num_threads);
  run_on_team(num_threads, [&](int thread) {
    const auto num_pieces = [&](int owner) { return std::min(kPieces, part_of(count, owner, num_threads).size()); };
    int owner;
    for (int64_t piece; shares.take(thread, num_pieces, owner, piece);) {
      const Range part = part_of(count, owner, num_threads);
      const Range range = part_of(part.size(), piece, num_pieces(owner));
      body(Range{part.first + range.first, part.first + range.last});
    }
  });
}

// body(index, range) for each of num_threads parts of [0, count), on a team: what is summed up for each part is the
// same whichever thread comes.
template <typename Body>
void for_parts(int64_t count, int num_threads, const Body& body) {
  Shares shares(num_threads);
  run_on_team(num_threads, [&](int thread) {
    int owner;
    for (int64_t piece; shares.take(thread, [](int) { return 1; }, owner, piece);) {
      body(owner, part_of(count, owner, num_threads));
    }
  });
}

}  // namespace

}  // namespace xrl
