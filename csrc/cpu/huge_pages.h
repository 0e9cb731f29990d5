// Large pages for large arrays that are about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "team.h"

namespace xrl {

// Fresh memory comes page by page, at a fault each: with 4 KiB pages a gradient of 1 GB costs 300,000 of them, longer
// than its computation. A hint: where the kernel has no large pages, nothing changes.
inline void advise_huge_pages(void* data, std::size_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 2u << 20;
  const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t stop = (reinterpret_cast<std::uintptr_t>(data) + num_bytes) / kPage * kPage;
  if (stop > start) madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#else
  (void)data;
  (void)num_bytes;
#endif
}

// Has the system put memory, all zeros, behind pages that nobody has written to yet: each thread some of the areas. At
// first use every page would keep one thread waiting, and the others for it.
static inline void populate_pages(const std::vector<char*>& areas, std::size_t num_bytes, int num_threads) {
  constexpr std::size_t kSmallestPage = 4096;
  Tasks tasks(static_cast<int64_t>(areas.size()));
  run_on_team(num_threads, [&](int) {
    for (int64_t area; tasks.take(area);) {
      for (std::size_t byte = 0; byte < num_bytes; byte += kSmallestPage) {
        *static_cast<volatile char*>(areas[area] + byte) = 0;
      }
    }
  });
}

}  // namespace xrl
