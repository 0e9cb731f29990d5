// Sums over the words of a tensor's bytes, taken while they are copied; xrl/weights/checksum.py makes a checksum of them.
#pragma once

#include <cstdint>

namespace xrl {

// A tensor's bytes are a table of 64-bit words, so many to a row.
constexpr int64_t kChecksumRowWords = 1024;
constexpr int64_t kChecksumRowBytes = 8 * kChecksumRowWords;

// Equal runs of bytes in two places: `sizes` of them along each of up to three dimensions, the last one the fastest.
struct ByteRuns {
  int64_t num_bytes;  // of a run
  int64_t sizes[3];
  int64_t source_strides[3];
  int64_t target_strides[3];
};

}  // namespace xrl

#define XRL_DECLARE_CHECKSUM(ISA)                                                                                  \
  namespace xrl::ISA {                                                                                             \
  /* rows [ceil(num_bytes / row)] and columns [1024] += the sums of the words at source; the last may be short */  \
  void add_sums(const char* source, int64_t num_bytes, uint64_t* rows, uint64_t* columns);                         \
  /* the same, and copies them to target, past the cache */                                                        \
  void copy_whole_and_add_sums(const char* source, char* target, int64_t num_bytes, uint64_t* rows,                \
                               uint64_t* columns);                                                                 \
  /* copies the runs at source to `offset` of the tensor at target, past the cache, and adds them to its sums; */  \
  /* offset, strides and lengths are multiples of 8 */                                                             \
  void copy_and_add_sums(const char* source, char* target, int64_t offset, const ByteRuns& runs, uint64_t* rows,   \
                         uint64_t* columns);                                                                       \
  }

XRL_DECLARE_CHECKSUM(scalar)
XRL_DECLARE_CHECKSUM(avx2)
XRL_DECLARE_CHECKSUM(avx512)

namespace xrl {

// The finaliser of splitmix64 (Steele et al., OOPSLA 2014) over a value and its place.
inline uint64_t mix(uint64_t value, uint64_t place) {
  uint64_t x = value ^ (place * 0x9E3779B97F4A7C15u);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The checksum of a tensor from its sums.
inline uint64_t mix_sums(const uint64_t* rows, int64_t num_rows, const uint64_t* columns) {
  uint64_t total = 0;
  for (int64_t i = 0; i < num_rows; ++i) total += mix(rows[i], static_cast<uint64_t>(i));
  for (int64_t j = 0; j < kChecksumRowWords; ++j) total += mix(columns[j], ~static_cast<uint64_t>(j));
  return total;
}

}  // namespace xrl
