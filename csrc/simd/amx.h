// AVX-512 and tiles: eight registers of up to 16 rows of 64 bytes, and an instruction that multiplies two of
// them into a third.
//
// Assembly, not intrinsics: those take the number of a tile as a literal, so a template has none to give, and
// GCC 12 does not know what memory they read. Whoever calls configure() calls release() before it returns:
// a thread that holds tiles has a larger state to save, and runs slower on some processors.
#pragma once

#include "simd/avx512.h"

namespace kvfold {
namespace {

struct Amx : Avx512 {
  static constexpr const char* kName = "amx";
  static constexpr int kTileRows = 16;

  // Tiles 0 to 3 are sums, [rows][16] in int32; 4 and 5 codes of x, [rows][columns]; 6 and 7 codes of 16 rows
  // of weights, four columns after the other: [columns / 4][16][4].
  static void configure(int rows, int columns) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
      shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : columns / 4);
      shapes.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? columns : 64);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  }
  static void release() { __asm__ volatile("tilerelease" : : : "memory"); }

  template <int tile>
  static void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  // What it reads was written before configure().
  template <int tile>
  static void load_tile(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile));
  }
  template <int tile>
  static void store_tile(int32_t (&rows)[kTileRows][kLanes]) {
    __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                     : "=m"(rows)
                     : "r"(rows), "r"(int64_t{kLanes * 4}), "i"(tile));
  }
  // Adds the products of signed codes.
  template <int sum, int x, int w>
  static void dot_tiles() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
};

// Rows are read as on AVX-512; panels hold signed levels.
template <class T>
struct Fast<Amx, T> : Fast<Avx512, T> {
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    Fast<Avx512, T>::template unpack<true>(raw, row_bytes, k, panel);
  }
};

}  // namespace
}  // namespace kvfold
