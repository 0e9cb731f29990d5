// Counters in memory that processes share: one counts its steps, others wait for them without a message between them.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#endif

namespace xrl {

// What was written before is seen by whoever sees the step.
inline void set_step(int32_t* counter, int32_t step) {
  __atomic_store_n(counter, step, __ATOMIC_RELEASE);
#if defined(__linux__)
  syscall(SYS_futex, counter, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// Whether the counter reached `step` within so many seconds.
inline bool wait_for_step(const int32_t* counter, int32_t step, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (;;) {
    const int32_t found = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
    if (found >= step) return true;
    const std::chrono::duration<double> left = deadline - std::chrono::steady_clock::now();
    if (left.count() <= 0) return false;
#if defined(__linux__)
    timespec time;
    time.tv_sec = static_cast<time_t>(left.count());
    time.tv_nsec = static_cast<long>((left.count() - static_cast<double>(time.tv_sec)) * 1e9);
    syscall(SYS_futex, counter, FUTEX_WAIT, found, &time, nullptr, 0);  // returns at once where it is another by now
#else
    std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
  }
}

}  // namespace xrl
