#include "team.h"

#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#ifdef __linux__
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xrl {
namespace {

// Between two small kernels a helper stays awake for so long, as waking it up would cost more than they do.
constexpr std::chrono::microseconds kSpin{100};

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `place` came to hold something else than `value` while we looked, without giving the core up.
bool changes_soon(const std::atomic<uint32_t>& place, uint32_t value) {
  constexpr int kLooks = 32;  // between two looks at the clock
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (place.load(std::memory_order_acquire) != value) return true;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

#ifdef __linux__
// Sleeps while `place` holds `value`, until it is woken up; may return without cause.
void sleep_on(std::atomic<uint32_t>& place, uint32_t value) {
  syscall(SYS_futex, &place, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& place) {
  syscall(SYS_futex, &place, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void sleep_on(std::atomic<uint32_t>&, uint32_t) { std::this_thread::sleep_for(kSpin); }

void wake_all(std::atomic<uint32_t>&) {}
#endif

class Team {
 public:
  void run(int num_threads, TeamBody body, const void* context) {
    if (is_taken_.exchange(true)) return body(context, 0);
    std::exception_ptr thrown_by_helper;
    {
      const Closing closing{*this, thrown_by_helper};
      start_helpers(num_threads - 1);
      body_ = body;
      context_ = context;
      num_threads_ = num_threads;
      gate_.store(kOpen);
      calls_.fetch_add(1);
      if (num_asleep_.load() > 0) wake_all(calls_);
      body(context, 0);
    }
    if (thrown_by_helper != nullptr) std::rethrow_exception(thrown_by_helper);
  }

 private:
  static constexpr uint32_t kOpen = 1u << 31;

  // However the caller's share ends: helpers that are inside look at what is on its stack.
  struct Closing {
    Team& team;
    std::exception_ptr& thrown_by_helper;

    ~Closing() {
      team.close();
      thrown_by_helper = std::exchange(team.thrown_, nullptr);
      team.has_thrown_.store(false);
      team.is_taken_.store(false);
    }
  };

  void close() {
    uint32_t gate = gate_.fetch_and(~kOpen) & ~kOpen;
    while (gate != 0) {
      if (!changes_soon(gate_, gate)) {
        caller_sleeps_.store(true);
        sleep_on(gate_, gate);
        caller_sleeps_.store(false);
      }
      gate = gate_.load();
    }
  }

  void start_helpers(int count) {
    try {
      for (; num_helpers_ < count; ++num_helpers_) {
        std::thread([this, index = num_helpers_ + 1, seen = calls_.load()] { help(index, seen); }).detach();
      }
    } catch (const std::exception&) {  // no more threads or no memory for one: those that there are do the work
    }
  }

  // A helper's share. What it throws is kept for the caller, who has no use for more than the first.
  void help_once(int thread) {
    try {
      body_(context_, thread);
    } catch (...) {
      if (!has_thrown_.exchange(true)) thrown_ = std::current_exception();
    }
  }

  // A helper's life, to the end of the process.
  [[noreturn]] void help(int thread, uint32_t seen) {
    bool had_work = true;
    for (;;) {
      if (calls_.load() == seen && !(had_work && changes_soon(calls_, seen))) {
        num_asleep_.fetch_add(1);
        sleep_on(calls_, seen);
        num_asleep_.fetch_sub(1);
        if (calls_.load() == seen) continue;
      }
      seen = calls_.load();
      had_work = enter();
      if (!had_work) continue;  // too late, and a core that others want is not for waiting
      if (thread < num_threads_) help_once(thread);
      if (gate_.fetch_sub(1) == 1 && caller_sleeps_.load()) wake_all(gate_);
    }
  }

  // False once the caller has closed the gate; it then waits for those that are inside.
  bool enter() {
    uint32_t gate = gate_.load();
    while ((gate & kOpen) != 0) {
      if (gate_.compare_exchange_weak(gate, gate + 1)) return true;
    }
    return false;
  }

  std::atomic<bool> is_taken_{false};  // by a caller; no mutex, which the same caller may not try again
  int num_helpers_ = 0;
  // What is to be done; written while the gate is closed and nobody inside.
  TeamBody body_ = nullptr;
  const void* context_ = nullptr;
  int num_threads_ = 0;
  // What a helper has thrown: written by the first one, read when the gate is closed again and nobody inside.
  std::atomic<bool> has_thrown_{false};
  std::exception_ptr thrown_;
  alignas(64) std::atomic<uint32_t> calls_{0};  // so far; helpers wait for the next one
  alignas(64) std::atomic<uint32_t> gate_{0};   // kOpen while there may be work, and the number of helpers inside
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> caller_sleeps_{false};
};

std::atomic<int> chosen_threads{0};

// Never destroyed: helpers run to the end of the process.
Team* team = nullptr;

Team* new_team() {
#ifdef __linux__
  // Threads do not come along into a forked process: it gets a team of its own.
  pthread_atfork(nullptr, nullptr, [] { team = new Team; });
#endif
  return new Team;
}

}  // namespace

void set_num_threads(int count) { chosen_threads.store(count); }

int num_threads() { return chosen_threads.load(); }

void call_team(int num_threads, TeamBody body, const void* context) {
  static const bool is_made = (team = new_team(), true);
  (void)is_made;
  team->run(num_threads, body, context);
}

}  // namespace xrl
