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

// Codes of 16 runs of 16, each with a scale. Three bytes hold four codes: the upper two bits of each are
// there for the fourth.
template <>
struct SideBySide<blocks::Q6_K> {
  using Standard = blocks::Q6_K;
  static constexpr int rows = kRowsSideBySide;

  uint8_t d[rows][2];
  int8_t scales[16][rows];
  uint8_t words[16][3][rows][4];  // of a run: codes 4 q + i in the lower six bits; fourth() has 12 + i

  // Its bits 4 and 5 are in the upper two of a, 2 and 3 in those of b, 0 and 1 in those of c, each exclusive
  // or what else the shifts bring there: so nothing has to be masked but the sum.
  static constexpr uint32_t fourth(uint32_t a, uint32_t b, uint32_t c) {
    return (a >> 2 ^ b >> 4 ^ c >> 6) & kSixBits;
  }

  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    uint32_t of_runs[16][4];
    for (int run = 0; run < 16; run++) {
      out.scales[run] = scales[run][k];
      uint32_t w[3];
      for (int q = 0; q < 3; q++) {
        w[q] = blocks::load32(words[run][q][k]);
        of_runs[run][q] = w[q] & kSixBits;
      }
      of_runs[run][3] = fourth(w[0], w[1], w[2]);
    }
    Codes codes;
    std::memcpy(codes, of_runs, sizeof codes);
    for (int half = 0; half < 2; half++) {
      const auto& [first, second, third, last] = codes[half];
      for (int i = 0; i < 32; i++) {
        out.ql[half][i] = static_cast<uint8_t>((first[i] & 15) | third[i] << 4);
        out.ql[half][32 + i] = static_cast<uint8_t>((second[i] & 15) | last[i] << 4);
        out.qh[half][i] = static_cast<uint8_t>(first[i] >> 4 | second[i] >> 4 << 2 | third[i] >> 4 << 4 |
                                               last[i] >> 4 << 6);
      }
    }
  }
  void put_row(int64_t k, const uint8_t* block) {
    Standard from;
    std::memcpy(&from, block, sizeof from);
    std::memcpy(d[k], from.d, 2);
    // In loops that become vectors of 16 bytes on any processor: word by word it took three times as long.
    Codes codes;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 32; i++) {
        const uint8_t first = from.ql[half][i], second = from.ql[half][32 + i], high = from.qh[half][i];
        codes[half][0][i] = static_cast<uint8_t>((first & 15) | (high << 4 & 0x30));
        codes[half][1][i] = static_cast<uint8_t>((second & 15) | (high << 2 & 0x30));
        codes[half][2][i] = static_cast<uint8_t>(first >> 4 | (high & 0x30));
        codes[half][3][i] = static_cast<uint8_t>(second >> 4 | (high >> 2 & 0x30));
      }
    }
    uint32_t of_runs[16][4], mixed[3][16];
    std::memcpy(of_runs, codes, sizeof of_runs);
    for (int run = 0; run < 16; run++) {
      const uint32_t* w = of_runs[run];
      const uint32_t upper = w[3] ^ fourth(w[0], w[1], w[2]);
      for (int q = 0; q < 3; q++) mixed[q][run] = w[q] | (upper << (2 + 2 * q) & 0xc0c0c0c0);
    }
    for (int run = 0; run < 16; run++) {
      scales[run][k] = from.scales[run];
      for (int q = 0; q < 3; q++) blocks::store32(words[run][q][k], mixed[q][run]);
    }
  }

 private:
  static constexpr uint32_t kSixBits = 0x3f3f3f3f;
  using Codes = uint8_t[2][4][32];  // in order
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
