// Whether indices that tensors hold stay inside of what they point into. Each check raises ValueError in Python, naming
// the tensor, the value and its place. Looking at an index costs next to nothing beside what is then read there.
#pragma once

#include <cstdint>

#include "cpu/decode_attention.h"
#include "cpu/packed_attention.h"

namespace xrl {

// The context of num_rows rows, in a cache of num_blocks blocks. Entries behind a context's end are not looked at.
void check_paged_rows(const PagedRows& rows, int64_t num_rows, int block_size, int64_t num_blocks);

// Rows of tables with num_positions of them.
void check_positions(const int32_t* positions, int64_t count, int64_t num_positions);

// Places in a cache with num_slots of them, or -1.
void check_slots(const int32_t* slots, int64_t count, int64_t num_slots);

// Each of num_tokens tokens belongs to one sequence, and what a sequence continues continues nothing.
void check_sequences(const PackedSequences& sequences, int64_t num_tokens);

}  // namespace xrl
