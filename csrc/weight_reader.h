// Weights on their way from a file into memory: what should not wait for Python between two pieces.
//
// Opens nothing, starts no thread and knows nothing of models; weight_memory.py decides what is read, and
// when.

#pragma once

#include <cstdint>

namespace kvfold {

// Reads bytes [start, start + size) of an open file to `to`. row_bytes > 0: whole groups of rows of a file's
// type, which are put side by side (kernels/side_by_side.h) while they are in the cache. Returns the bytes of
// the file that there were, fewer than `size` where it ends; -1 where the system cannot read, with the reason
// in errno.
int64_t read_weights(int descriptor, int64_t start, int64_t size, uint8_t* to, int32_t type_id,
                     int64_t row_bytes);

}  // namespace kvfold
