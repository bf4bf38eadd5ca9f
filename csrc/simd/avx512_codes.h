// Codes and scales of a block as 512-bit vectors: what row dots and panels (avx512_dots.h), rows to float32
// (avx512_decode.h) and rows side by side begin with.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simd/avx2_codes.h"
#include "simd/avx512.h"

namespace kvfold {
namespace {

// Nibbles to codes, 64 at a time.
template <class T>
struct Nibbles {
  static __m512i low(__m512i packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
  static __m512i high(__m512i packed) { return low(_mm512_srli_epi16(packed, 4)); }
};

// Through a table of 64 entries, four times the 16 levels: whatever else the six index bits hold needs no
// masking.
template <>
struct Nibbles<blocks::IQ4_NL> {
  static __m512i table() { return _mm512_broadcast_i32x4(Codes32<blocks::IQ4_NL>::table<128>()); }
  static __m512i low(__m512i packed) { return _mm512_permutexvar_epi8(packed, table()); }
  static __m512i high(__m512i packed) { return low(_mm512_srli_epi16(packed, 4)); }
};

// As signed levels.
template <class T>
struct SignedNibbles {
  static __m512i table();
  static __m512i low(__m512i packed) { return _mm512_permutexvar_epi8(packed, table()); }
  static __m512i high(__m512i packed) { return low(_mm512_srli_epi16(packed, 4)); }
};
template <>
inline __m512i SignedNibbles<blocks::Q4_0>::table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline __m512i SignedNibbles<blocks::IQ4_NL>::table() {
  return _mm512_broadcast_i32x4(Codes32<blocks::IQ4_NL>::table<0>());
}

// Fifth bits of Q5_0 and Q5_1, one at any place of its 64-bit lane for each byte, onto nibbles: `place` is
// where it is less 4.
inline __m512i with_fifths(__m512i nibbles, __m512i bits, __m512i place) {
  const __m512i fourth = _mm512_multishift_epi64_epi8(place, bits);
  return _mm512_ternarylogic_epi32(nibbles, fourth, _mm512_set1_epi8(16), 0xf8);  // | (fourth & 16)
}

// Scales of types of 256 weights.
template <class T>
struct Scales256;

// Eight runs of 32 with 6-bit scales and minimums.
template <>
struct Scales256<blocks::Q4_K> {
  // d times the scales, then dmin times the minimums.
  static __m512 scales(const uint8_t* p) {
    uint32_t both;
    std::memcpy(&both, p, 4);
    const __m128 halves = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(both)));
    const __m512 d = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_broadcastss_ps(halves)),
                                        _mm256_broadcastss_ps(_mm_movehdup_ps(halves)), 1);
    const SixBits of_runs(p + 4);
    const __m128i codes =
        _mm_set_epi64x(static_cast<int64_t>(of_runs.minimums), static_cast<int64_t>(of_runs.scales));
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)));
  }
};

// Sixteen runs of 16 with int8 scales.
template <>
struct Scales256<blocks::Q6_K> {
  static __m512 scales(const uint8_t* p) {
    return _mm512_mul_ps(Avx512::half(p + 208),
                         _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Avx512::load16(p + 192))));
  }
};

}  // namespace
}  // namespace kvfold
