// AVX-512 and tiles: eight registers of up to 16 rows of 64 bytes, and an instruction that multiplies two of
// them into a third: sums [rows][16] += a [rows][words] times b [words][16], a word being two bfloat16 or
// four codes. What lies outside of a tile's shape is neither read nor written.
//
// Assembly, not intrinsics: those take the number of a tile as a literal, so a template has none to give, and
// GCC 12 does not know what memory they read. Whoever calls configure() calls release() before it returns:
// a thread that holds tiles has a larger state to save, and runs slower on some processors.
#pragma once

#include "simd/avx512.h"
#include "simd/tile_shapes.h"

namespace kvfold {
namespace {

struct Amx : Avx512 {
  static constexpr const char* kName = "amx";
  static constexpr int kTileRows = 16, kTileWords = 16;
  using Vectors = Avx512;

  using TileShapes = kvfold::TileShapes;
  static void configure(const TileShapes& shapes) {
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  }

  // Tiles 0 to 3 are sums, [16 rows][16] in int32; 4 and 5 codes of x, [16 rows][columns]; 6 and 7 codes of
  // 16 rows of weights, four columns after the other: [columns / 4][16][4].
  static constexpr TileShapes code_shapes(int columns) {
    TileShapes shapes;
    for (int tile = 4; tile < 8; tile++) {
      if (tile < 6) shapes.row_bytes[tile] = static_cast<uint16_t>(columns);
      if (tile >= 6) shapes.rows[tile] = static_cast<uint8_t>(columns / 4);
    }
    return shapes;
  }
  static void release() { __asm__ volatile("tilerelease" : : : "memory"); }

  template <int tile>
  static void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  // What it reads was written before configure() or written().
  template <int tile>
  static void load_tile(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile));
  }
  static void written() { __asm__ volatile("" : : : "memory"); }
  template <int tile>
  static void store_tile(void* rows, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
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
  // Of unsigned bytes and signed codes.
  template <int sum, int x, int w>
  static void dot_bytes() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }
  // Of pairs of bfloat16.
  template <int sum, int x, int w>
  static void dot_pairs() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(x), "i"(w));
  }

  // 32 columns of two keys to words of pairs.
  static void pair_columns(const uint16_t* even, const uint16_t* odd, uint32_t* to, uint32_t* to_last) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order =
        _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
    const auto columns = [&](int64_t at) {
      const __m512i a =
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + at)));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + at));
      return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(a, b, 1));
    };
    store_codes(to, columns(0));
    store_codes(to_last, columns(16));
  }
  // 16 columns of four keys to words of four codes.
  static Ints quad_columns(const int8_t* const (&keys)[4]) {
    const __m512i byte = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(
        _mm512_or_si512(byte, _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(16)), 8)),
        _mm512_or_si512(_mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(32)), 16),
                        _mm512_slli_epi32(_mm512_add_epi32(byte, _mm512_set1_epi32(48)), 24)));
    const auto key = [&](int i) { return load16(reinterpret_cast<const uint8_t*>(keys[i])); };
    __m512i v = _mm512_castsi128_si512(key(0));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, key(1));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, key(2));
    v = _mm512_mask_broadcast_i32x4(v, 0xf000, key(3));
    return _mm512_permutexvar_epi8(order, v);
  }

  // 64 int16 of 0 .. 32767 times shares, as two bytes each: number i of the first 32 at byte 2 i, of the
  // others at 2 i + 1.
  static void share_bytes(const uint32_t* whole, const uint32_t* shares, uint8_t* low, uint8_t* high) {
    const __m512i a = multiply_shares(load_codes(whole), load_codes(shares));
    const __m512i b = multiply_shares(load_codes(whole + 16), load_codes(shares + 16));
    const __m512i first = _mm512_set1_epi16(0xff);
    store_codes(low, _mm512_ternarylogic_epi32(first, a, _mm512_slli_epi16(b, 8), 0xea));   // first & a | b
    store_codes(high, _mm512_ternarylogic_epi32(first, _mm512_srli_epi16(a, 8), b, 0xca));  // first ? a : b
  }
  static Ints add_high(Ints low, Ints high) {  // low + 256 high
    return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
  }
};

}  // namespace
}  // namespace kvfold
