#include "cpu/checksum.h"

#include <algorithm>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xrl::XRL_ISA {
namespace {

#if defined(__AVX512F__)
using Words = __m512i;
inline Words load(const void* place) { return _mm512_loadu_si512(place); }
inline void store(void* place, Words words) { _mm512_storeu_si512(place, words); }
inline void stream(void* place, Words words) { _mm512_stream_si512(reinterpret_cast<__m512i*>(place), words); }
inline Words add(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words zero() { return _mm512_setzero_si512(); }
#elif defined(__AVX2__)
using Words = __m256i;
inline Words load(const void* place) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)); }
inline void store(void* place, Words words) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), words); }
inline void stream(void* place, Words words) { _mm256_stream_si256(reinterpret_cast<__m256i*>(place), words); }
inline Words add(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words zero() { return _mm256_setzero_si256(); }
#else
using Words = uint64_t;
inline Words load(const void* place) {
  Words words;
  std::memcpy(&words, place, sizeof words);
  return words;
}
inline void store(void* place, Words words) { std::memcpy(place, &words, sizeof words); }
inline void stream(void* place, Words words) { store(place, words); }
inline Words add(Words a, Words b) { return a + b; }
inline Words zero() { return 0; }
#endif

constexpr int64_t kBytes = sizeof(Words);

inline uint64_t total_of(Words words) {
  uint64_t each[kBytes / 8];
  std::memcpy(each, &words, sizeof words);
  uint64_t total = 0;
  for (uint64_t word : each) total += word;
  return total;
}

// One word at a time: the ends that a vector does not fill.
template <bool kCopies>
inline uint64_t few_words(const char* source, int64_t num_bytes, char* target, uint64_t* columns) {
  uint64_t total = 0;
  for (int64_t i = 0; i < num_bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, source + i, sizeof word);
    if (kCopies) std::memcpy(target + i, &word, sizeof word);
    columns[i / 8] += word;
    total += word;
  }
  return total;
}

// The sum of words within one row; they are added to the columns, and copied to target. Bytes are multiples of 8.
template <bool kCopies>
uint64_t part_of_row(const char* source, int64_t num_bytes, char* target, uint64_t* columns) {
  int64_t i = 0;
  uint64_t total = 0;
  if (kCopies) {  // stores past the cache must be aligned
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kBytes);
    if (misaligned % 8 != 0) return few_words<true>(source, num_bytes, target, columns);
    i = std::min(num_bytes, misaligned == 0 ? 0 : kBytes - misaligned);
    total += few_words<true>(source, i, target, columns);
  }
  Words sums[2] = {zero(), zero()};
  for (; i + 2 * kBytes <= num_bytes; i += 2 * kBytes) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = i + half * kBytes;
      const Words words = load(source + at);
      if (kCopies) stream(target + at, words);
      sums[half] = add(sums[half], words);
      store(columns + at / 8, add(load(columns + at / 8), words));
    }
  }
  total += total_of(add(sums[0], sums[1]));
  return total + few_words<kCopies>(source + i, num_bytes - i, kCopies ? target + i : nullptr, columns + i / 8);
}

template <bool kCopies>
void add_run(const char* source, int64_t num_bytes, char* target, int64_t offset, uint64_t* rows, uint64_t* columns) {
  while (num_bytes > 0) {
    const int64_t row = offset / kChecksumRowBytes, start = offset % kChecksumRowBytes;
    const int64_t count = std::min(num_bytes, kChecksumRowBytes - start);
    rows[row] += part_of_row<kCopies>(source, count, kCopies ? target + offset : nullptr, columns + start / 8);
    source += count;
    offset += count;
    num_bytes -= count;
  }
}

// A whole tensor, whose last word may be short.
template <bool kCopies>
void add_whole(const char* source, char* target, int64_t num_bytes, uint64_t* rows, uint64_t* columns) {
  const int64_t whole = num_bytes / 8 * 8;
  add_run<kCopies>(source, whole, target, 0, rows, columns);
  if (whole == num_bytes) return;
  const std::size_t rest = static_cast<std::size_t>(num_bytes - whole);
  uint64_t last = 0;  // zeros behind the last byte
  std::memcpy(&last, source + whole, rest);
  if (kCopies) std::memcpy(target + whole, source + whole, rest);
  rows[whole / kChecksumRowBytes] += last;
  columns[whole % kChecksumRowBytes / 8] += last;
}

// Others read what was streamed.
inline void complete_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace

void add_sums(const char* source, int64_t num_bytes, uint64_t* rows, uint64_t* columns) {
  add_whole<false>(source, nullptr, num_bytes, rows, columns);
}

void copy_whole_and_add_sums(const char* source, char* target, int64_t num_bytes, uint64_t* rows, uint64_t* columns) {
  add_whole<true>(source, target, num_bytes, rows, columns);
  complete_streams();
}

void copy_and_add_sums(const char* source, char* target, int64_t offset, const ByteRuns& runs, uint64_t* rows,
                       uint64_t* columns) {
  for (int64_t i = 0; i < runs.sizes[0]; ++i) {
    for (int64_t j = 0; j < runs.sizes[1]; ++j) {
      for (int64_t k = 0; k < runs.sizes[2]; ++k) {
        const char* from = source + i * runs.source_strides[0] + j * runs.source_strides[1] + k * runs.source_strides[2];
        const int64_t to = offset + i * runs.target_strides[0] + j * runs.target_strides[1] + k * runs.target_strides[2];
        add_run<true>(from, runs.num_bytes, target, to, rows, columns);
      }
    }
  }
  complete_streams();
}

}  // namespace xrl::XRL_ISA
