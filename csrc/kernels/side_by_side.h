// Rows side by side: how weights lie that were put in order for row dots when they were copied into memory.
//
// 16 rows become a sequence of mixed blocks, one for each block of theirs, in the memory of the rows. A mixed
// block begins with the float16 fields of the block, in their order, each [16 rows]. The other bytes follow
// in their order as words of four bytes, each [16 rows][4]. So a lane of 32 bits belongs to one row: a vector
// meets the same four codes of x in all lanes, the sum of a row stays in its lane, and eight scales are one
// load. Types of 256 columns have scales of their runs besides, and an order of their own. Types in this
// layout have numbers of their own, which no file has; src/kvfold/quant/types.py lists them.
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

// Codes of 8 times 32 columns, two runs of 16 with a scale each, in the order in which they are multiplied.
template <>
struct SideBySide<blocks::Q6_K> {
  using Standard = blocks::Q6_K;
  static constexpr int rows = kRowsSideBySide;

  uint8_t d[rows][2];
  int8_t scales[16][rows];
  struct {
    // Of run h two bits of the codes i, 4 + i, 8 + i and 12 + i, lowest first.
    uint8_t high[2][rows][4];
    // Four bits of the codes 8 q + i in the low nibbles, of 8 q + 4 + i in the high ones.
    uint8_t low[4][rows][4];
  } columns[8];

  void take_row(int64_t k, Standard& out) const {
    std::memset(&out, 0, sizeof out);
    std::memcpy(out.d, d[k], 2);
    for (int run = 0; run < 16; run++) out.scales[run] = scales[run][k];
    for (int of = 0; of < 8; of++) {
      uint8_t* nibbles = out.ql[of / 4] + of % 2 * 32;
      for (int j = 0; j < 32; j++) {
        const int low = columns[of].low[j / 8][k][j % 4] >> j / 4 % 2 * 4 & 15,
                  high = columns[of].high[j / 16][k][j % 4] >> j / 4 % 4 * 2 & 3;
        nibbles[j] |= static_cast<uint8_t>(low << of / 2 % 2 * 4);
        out.qh[of / 4][j] |= static_cast<uint8_t>(high << of % 4 * 2);
      }
    }
  }
  void put_row(int64_t k, const uint8_t* block) {
    Standard from;
    std::memcpy(&from, block, sizeof from);
    std::memcpy(d[k], from.d, 2);
    for (int run = 0; run < 16; run++) scales[run][k] = from.scales[run];
    for (int of = 0; of < 8; of++) {
      const uint8_t* nibbles = from.ql[of / 4] + of % 2 * 32;
      const auto low = [&](int at) { return blocks::load32(nibbles + at) >> of / 2 % 2 * 4 & 0x0f0f0f0f; };
      const auto high = [&](int at) {
        return blocks::load32(from.qh[of / 4] + at) >> of % 4 * 2 & 0x03030303;
      };
      for (int q = 0; q < 4; q++) {
        blocks::store32(columns[of].low[q][k], low(8 * q) | low(8 * q + 4) << 4);
      }
      for (int h = 0; h < 2; h++) {
        blocks::store32(columns[of].high[h][k], high(16 * h) | high(16 * h + 4) << 2 | high(16 * h + 8) << 4 |
                                                    high(16 * h + 12) << 6);
      }
    }
  }
};

// use(Type<T>, ggml's number) for every type that has this layout.
template <class Use>
constexpr void for_each_side_by_side(const Use& use) {
  use(Type<blocks::Q4_0>(), 2), use(Type<blocks::Q5_0>(), 6), use(Type<blocks::Q8_0>(), 8);
  use(Type<blocks::Q4_K>(), 12), use(Type<blocks::Q6_K>(), 14), use(Type<blocks::IQ4_NL>(), 20);
}

// The number of a file's type side by side.
constexpr int32_t side_by_side_id(int32_t id) { return -100 - id; }

// Rows of a file's type from `from` to `to`, which do not overlap, in this layout. rows: a multiple of 16.
// Nothing is done where the type has no such layout.
void put_side_by_side(int32_t type_id, const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to);

}  // namespace kvfold
