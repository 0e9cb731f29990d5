#include "index_checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace xrl {
namespace {

// Longer ones could not be counted in 32 bits, with what kernels look ahead.
constexpr int64_t kMostTokens = int64_t{1} << 30;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

// The first of `count` numbers that is not in [lowest, end); `count` where all are. It is searched for only where there
// is one: a loop that looks at all numbers becomes vector code.
int64_t first_outside(const int32_t* values, int64_t count, int64_t lowest, int64_t end) {
  const int32_t low = static_cast<int32_t>(std::max<int64_t>(lowest, INT32_MIN));
  const int32_t high = static_cast<int32_t>(std::min<int64_t>(end - 1, INT32_MAX));
  int outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= (values[i] < low) | (values[i] > high);
  if (outside == 0) return count;
  return std::find_if(values, values + count, [&](int32_t value) { return value < low || value > high; }) - values;
}

std::string range(int64_t lowest, int64_t end) {
  return "in [" + std::to_string(lowest) + ", " + std::to_string(end) + ")";
}

void check_all(const char* name, const int32_t* values, int64_t count, int64_t lowest, int64_t end) {
  const int64_t place = first_outside(values, count, lowest, end);
  if (place == count) return;
  refuse(std::string(name) + " must be " + range(lowest, end) + ", got " + std::to_string(values[place]) +
         " at place " + std::to_string(place));
}

// Blocks of contexts: `blocks` has a row of `num_columns` for each, `stride` apart.
void check_blocks(const char* name, const int32_t* blocks, int64_t stride, int64_t num_columns, const char* lengths_name,
                  const int32_t* lengths, int64_t count, int block_size, int64_t num_blocks) {
  check_all(lengths_name, lengths, count, 0, std::min(num_columns * block_size, kMostTokens) + 1);
  for (int64_t row = 0; row < count; ++row) {
    const int32_t* own = blocks + row * stride;
    const int64_t num_used = (static_cast<int64_t>(lengths[row]) + block_size - 1) / block_size;
    const int64_t place = first_outside(own, num_used, 0, num_blocks);
    if (place == num_used) continue;
    refuse(std::string(name) + " must be " + range(0, num_blocks) + ", the blocks of the cache, got " +
           std::to_string(own[place]) + " in row " + std::to_string(row));
  }
}

}  // namespace

void check_paged_rows(const PagedRows& rows, int64_t num_rows, int block_size, int64_t num_blocks) {
  const int32_t* starts = rows.group_starts;
  bool ascends = starts[0] == 0 && starts[rows.num_groups] == num_rows;
  for (int group = 0; group < rows.num_groups; ++group) ascends = ascends && starts[group] <= starts[group + 1];
  if (!ascends) refuse("group_starts must go from 0 to " + std::to_string(num_rows) + ", without a step back");
  check_blocks("prompt_blocks", rows.prompt_blocks, rows.prompt_blocks_stride, rows.prompt_blocks_columns,
               "prompt_lengths", rows.prompt_lengths, rows.num_groups, block_size, num_blocks);
  check_blocks("row_blocks", rows.row_blocks, rows.row_blocks_stride, rows.row_blocks_columns, "row_lengths",
               rows.row_lengths, num_rows, block_size, num_blocks);
}

void check_positions(const int32_t* positions, int64_t count, int64_t num_positions) {
  check_all("positions", positions, count, 0, num_positions);
}

void check_slots(const int32_t* slots, int64_t count, int64_t num_slots) {
  check_all("slots", slots, count, -1, num_slots);
}

void check_sequences(const PackedSequences& sequences, int64_t num_tokens) {
  const auto& [starts, lengths, parents, count, step] = sequences;
  if (step < 1 || step > kMostTokens) refuse("step must be in [1, 2^30], got " + std::to_string(step));
  if (num_tokens < 0) refuse("num_tokens must be >= 0, got " + std::to_string(num_tokens));
  std::vector<bool> is_taken(static_cast<std::size_t>(num_tokens));
  int64_t total = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t length = lengths[s], parent = parents[s];
    if (length < 1) refuse("lengths must be >= 1, got " + std::to_string(length) + " at place " + std::to_string(s));
    if (parent < -1 || parent >= count || (parent >= 0 && parents[parent] != -1)) {
      refuse("parents must be -1 or a sequence that continues none, got " + std::to_string(parent) + " at place " +
             std::to_string(s));
    }
    total += length;
    for (int64_t i = 0, token = starts[s]; i < length; ++i, token += step) {
      if (token < 0 || token >= num_tokens || is_taken[static_cast<std::size_t>(token)]) {
        refuse("starts and lengths must give each of " + std::to_string(num_tokens) +
               " tokens to one sequence, got token " + std::to_string(token) + " in sequence " + std::to_string(s));
      }
      is_taken[static_cast<std::size_t>(token)] = true;
    }
  }
  if (total != num_tokens) {
    refuse("lengths must add up to num_tokens, " + std::to_string(num_tokens) + ", got " + std::to_string(total));
  }
}

}  // namespace xrl
