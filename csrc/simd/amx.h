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
  static constexpr int64_t kPairStep = kTileWords;
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

  // 32 columns of two or four keys to words, in two vectors of 16: columns 0 to 3, 8 to 11, 16 to 19 and 24
  // to 27, and those between them, as in_order() puts them.
  static void pair_columns(const uint16_t* even, const uint16_t* odd, uint32_t* first, uint32_t* second) {
    const __m512i a = load_codes(even), b = load_codes(odd);
    store_codes(first, _mm512_unpacklo_epi16(a, b));
    store_codes(second, _mm512_unpackhi_epi16(a, b));
  }
  static __m512i wide(const int8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void quad_columns(const int8_t* const (&keys)[4], uint32_t* first, uint32_t* second) {
    const __m512i ab = _mm512_or_si512(wide(keys[0]), _mm512_slli_epi16(wide(keys[1]), 8));
    const __m512i cd = _mm512_or_si512(wide(keys[2]), _mm512_slli_epi16(wide(keys[3]), 8));
    store_codes(first, _mm512_unpacklo_epi16(ab, cd));
    store_codes(second, _mm512_unpackhi_epi16(ab, cd));
  }
  static void in_order(Floats first, Floats second, Floats (&columns)[2]) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    columns[0] = _mm512_permutex2var_ps(first, low, second);
    columns[1] = _mm512_permutex2var_ps(first, _mm512_add_epi32(low, _mm512_set1_epi32(8)), second);
  }

  // 64 int16 of 0 .. 32767 times shares, as two bytes each: number 8 i + j of the first 32 at byte 16 i + j,
  // of the others at 16 i + 8 + j.
  static void share_bytes(const uint32_t* whole, const uint32_t* shares, uint8_t* low, uint8_t* high) {
    const __m512i a = multiply_shares(load_codes(whole), load_codes(shares));
    const __m512i b = multiply_shares(load_codes(whole + 16), load_codes(shares + 16));
    const __m512i byte = _mm512_set1_epi16(0xff);
    store_codes(low, _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
    store_codes(high, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
  }
  static Ints add_high(Ints low, Ints high) {  // low + 256 high
    return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
  }
  // 16 float16.
  static Floats load_halves(const uint16_t* p) { return load_half(reinterpret_cast<const uint8_t*>(p)); }
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
