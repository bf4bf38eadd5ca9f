// Rows side by side: how weights lie that were put in order for row dots when they were copied into memory.
//
// 16 rows become a sequence of mixed blocks, one for each block of theirs, in the memory of the rows. A mixed
// block begins with the float16 fields of the block, in their order, each [16 rows]. The other bytes follow
// in their order as words of four bytes, each [16 rows][4]. So a lane of 32 bits belongs to one row: a vector
// meets the same four codes of x in all lanes, the sum of a row stays in its lane, and eight scales are one
// load. Q4_K has scales of its runs in an order of their own between the two. Types in this layout have
// numbers of their own, which no file has; src/kvfold/quant/types.py lists them.
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

// Codes of 8 runs of 32, each with a scale and a minimum of six bits. A mixed block is 36 lines of 64 bytes,
// of which the first four have what is not codes.
template <>
struct SideBySide<blocks::Q4_K> {
  using Standard = blocks::Q4_K;
  static constexpr int rows = kRowsSideBySide;

  uint8_t d[rows][2], dmin[rows][2];
  uint8_t upper[4][rows];  // upper two bits of scale and minimum of run r, then of run 4 + r, lowest first
  uint8_t lower[8][rows];  // lower four bits of scale and minimum of a run
  uint8_t words[8][4][rows][4];  // of a run: codes 4 q + i in the low nibbles, 16 + 4 q + i in the high ones

  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memcpy(out.dmin, dmin[k], 2);
    for (int r = 0; r < 4; r++) {
      const int below = lower[r][k], above = upper[r][k];
      out.scales[r] = static_cast<uint8_t>((below & 15) | (above & 3) << 4 | (above >> 4 & 3) << 6);
      out.scales[4 + r] = static_cast<uint8_t>(below >> 4 | (above >> 2 & 3) << 4 | above >> 6 << 6);
      out.scales[8 + r] = lower[4 + r][k];
    }
    for (int pair = 0; pair < 4; pair++) {
      for (int q = 0; q < 4; q++) {
        const uint32_t even = blocks::load32(words[2 * pair][q][k]),
                       odd = blocks::load32(words[2 * pair + 1][q][k]);
        blocks::store32(out.qs[pair] + 4 * q, (even & kLow) | (odd & kLow) << 4);
        blocks::store32(out.qs[pair] + 16 + 4 * q, (even >> 4 & kLow) | (odd & ~kLow));
      }
    }
  }
  void put_row(int64_t k, const uint8_t* block) {
    Standard from;
    std::memcpy(&from, block, sizeof from);
    std::memcpy(d[k], from.d, 2);
    std::memcpy(dmin[k], from.dmin, 2);
    for (int r = 0; r < 4; r++) {
      const int scale = from.scales[r], minimum = from.scales[4 + r];
      upper[r][k] = static_cast<uint8_t>((scale >> 4 & 3) | (minimum >> 4 & 3) << 2 | scale >> 6 << 4 |
                                         minimum >> 6 << 6);
      lower[r][k] = static_cast<uint8_t>((scale & 15) | (minimum & 15) << 4);
      lower[4 + r][k] = from.scales[8 + r];
    }
    for (int pair = 0; pair < 4; pair++) {
      for (int q = 0; q < 4; q++) {
        const uint32_t first = blocks::load32(from.qs[pair] + 4 * q),
                       second = blocks::load32(from.qs[pair] + 16 + 4 * q);
        blocks::store32(words[2 * pair][q][k], (first & kLow) | (second & kLow) << 4);
        blocks::store32(words[2 * pair + 1][q][k], (first >> 4 & kLow) | (second & ~kLow));
      }
    }
  }

 private:
  static constexpr uint32_t kLow = 0x0f0f0f0f;
};

// The number of a file's type side by side.
constexpr int32_t side_by_side_id(int32_t id) { return -100 - id; }

// Rows of a file's type from `from` to `to`, which do not overlap, in this layout. rows: a multiple of 16.
// Nothing is done where the type has no such layout.
void put_side_by_side(int32_t type_id, const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to);

}  // namespace kvfold
