// Squares of numbers turned over in registers. All functions are static: this file is compiled once per instruction set.
#pragma once

#include "cpu/lanes.h"

namespace xrl {

// Two registers' numbers by turns, the first halves' and the second halves'.
static inline void interleave(Lanes a, Lanes b, Lanes& low, Lanes& high) {
  LaneBits first, second;
  for (int lane = 0; lane < kLanes / 2; ++lane) {
    first[2 * lane] = lane;
    first[2 * lane + 1] = lane + kLanes;
    second[2 * lane] = lane + kLanes / 2;
    second[2 * lane + 1] = lane + kLanes / 2 + kLanes;
  }
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, second);
}

// Of kLanes x kLanes numbers: log2(kLanes) perfect shuffles.
static inline void transpose(Lanes (&rows)[kLanes]) {
  for (int size = 1; size < kLanes; size *= 2) {
    Lanes shuffled[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], shuffled[2 * i], shuffled[2 * i + 1]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
  }
}

}  // namespace xrl
