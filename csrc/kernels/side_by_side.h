// Rows side by side: how weights lie that were put in order for row dots when they were copied into memory.
//
// 16 rows become a sequence of mixed blocks, one for each block of theirs, in the memory of the rows. A mixed
// block begins with the float16 fields of the block, in their order, each [16 rows]. The other bytes follow
// in their order as words of four bytes, each [16 rows][4]. So a lane of 32 bits belongs to one row: a vector
// meets the same four codes of x in all lanes, the sum of a row stays in its lane, and eight scales are one
// load. Types in this layout have numbers of their own, which no file has; src/kvfold/quant/types.py lists
// them.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/decode_blocks.h"

namespace kvfold {

constexpr int kRowsSideBySide = 16;

// Of a type that is one float16 and codes.
template <class T>
struct SideBySide {
  using Standard = T;
  static constexpr int rows = kRowsSideBySide, num_words = (sizeof(T) - 2) / 4;

  uint8_t scales[rows][2];
  uint8_t words[num_words][rows][4];

  void take_row(int64_t k, T& out) const {
    auto* bytes = reinterpret_cast<uint8_t*>(&out);
    std::memcpy(bytes, scales[k], 2);
    for (int i = 0; i < num_words; i++) std::memcpy(bytes + 2 + 4 * i, words[i][k], 4);
  }
  void put_row(int64_t k, const uint8_t* block) {
    std::memcpy(scales[k], block, 2);
    for (int i = 0; i < num_words; i++) std::memcpy(words[i][k], block + 2 + 4 * i, 4);
  }
};

// The number of a file's type side by side.
constexpr int32_t side_by_side_id(int32_t id) { return -100 - id; }

// Rows of a file's type from `from` to `to`, which do not overlap, in this layout. rows: a multiple of 16.
// Nothing is done where the type has no such layout.
void put_side_by_side(int32_t type_id, const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to);

}  // namespace kvfold
