// Scratch memory that starts on the border of a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace xrl {

struct FreeAligned {
  void operator()(float* place) const { ::operator delete[](place, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

inline Floats make_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new[](sizeof(float) * count, std::align_val_t{64})));
}

constexpr int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace xrl
