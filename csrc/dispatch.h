// Which instruction set this machine runs.
#pragma once

#include <cstdlib>
#include <cstring>

namespace xrl {

enum class Isa { kScalar, kAvx2, kAvx512 };

// XRL_CPU_ISA=scalar|avx2|avx512 asks for less than the machine has, to test the other builds.
inline Isa best_isa() {
#ifdef XRL_HAS_X86_ISAS
  const char* wanted = std::getenv("XRL_CPU_ISA");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (wanted == nullptr || std::strcmp(wanted, "avx512") == 0)) return Isa::kAvx512;
  if (avx2 && (wanted == nullptr || std::strcmp(wanted, "scalar") != 0)) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

inline Isa isa() {
  static const Isa chosen = best_isa();
  return chosen;
}

}  // namespace xrl

// Calls FUNCTION in the namespace of the machine's instruction set.
#ifdef XRL_HAS_X86_ISAS
#define XRL_DISPATCH(FUNCTION, ...)                           \
  do {                                                        \
    switch (::xrl::isa()) {                                   \
      case ::xrl::Isa::kAvx512:                               \
        ::xrl::avx512::FUNCTION(__VA_ARGS__);                 \
        break;                                                \
      case ::xrl::Isa::kAvx2:                                 \
        ::xrl::avx2::FUNCTION(__VA_ARGS__);                   \
        break;                                                \
      default:                                                \
        ::xrl::scalar::FUNCTION(__VA_ARGS__);                 \
    }                                                         \
  } while (false)
#else
#define XRL_DISPATCH(FUNCTION, ...) ::xrl::scalar::FUNCTION(__VA_ARGS__)
#endif
