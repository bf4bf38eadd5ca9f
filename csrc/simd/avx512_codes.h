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

// Scales of types of 256 weights, and their codes a half at a time, in two vectors: of runs of 16 in order;
// of runs of 32 the first and the third run of the half, then the others.
template <class T>
struct Halves;

// 32 bytes twice, rotated within 64 bits to the right: bits that stay in their byte are those of a mask.
inline __m512i rotated(const uint8_t* p, int64_t lower, int64_t upper) {
  const __m512i bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_rorv_epi64(bytes, _mm512_setr_epi64(lower & 63, lower & 63, lower & 63, lower & 63,
                                                    upper & 63, upper & 63, upper & 63, upper & 63));
}
// low | (bits & mask)
inline __m512i on_top(__m512i low, __m512i bits, char mask) {
  return _mm512_ternarylogic_epi32(low, bits, _mm512_set1_epi8(mask), 0xf8);
}

// Eight runs of 32 nibbles with 6-bit scales and minimums, in Q5_K with fifth bits, bit i of a byte for run
// i.
template <class T>
struct NibbleHalves {
  // d times the scales, then dmin times the minimums.
  static __m512 both(const uint8_t* p) {
    uint32_t halves;
    std::memcpy(&halves, p, 4);
    const __m128 two = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(halves)));
    const __m512 d = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_broadcastss_ps(two)),
                                        _mm256_broadcastss_ps(_mm_movehdup_ps(two)), 1);
    const SixBits of_runs(p + 4);
    const __m128i codes =
        _mm_set_epi64x(static_cast<int64_t>(of_runs.minimums), static_cast<int64_t>(of_runs.scales));
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)));
  }
  // Of the runs in the lower lanes, and what the sums of x are multiplied by.
  static void scales(const uint8_t* p, __m512& scale, __m512& subtracted) {
    scale = both(p);
    subtracted = _mm512_zextps256_ps512(_mm512_extractf32x8_ps(scale, 1));
  }
  static void codes(const uint8_t* p, int half, __m512i (&out)[2]) {
    using Runs = Codes256<T>;
    const __m512i packed = _mm512_loadu_si512(p + Runs::kNibbles + 64 * half), nibble = _mm512_set1_epi8(15);
    out[0] = _mm512_and_si512(packed, nibble);
    out[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
    if constexpr (Runs::kHasFifth) {
      const int64_t run = 4 * half;
      out[0] = on_top(out[0], rotated(p + Runs::kFifths, run - 4, run - 2), 16);
      out[1] = on_top(out[1], rotated(p + Runs::kFifths, run - 3, run - 1), 16);
    }
  }
};
template <>
struct Halves<blocks::Q4_K> : NibbleHalves<blocks::Q4_K> {};
template <>
struct Halves<blocks::Q5_K> : NibbleHalves<blocks::Q5_K> {};

// Sixteen runs of 16.
template <class T>
struct ScalesOf16 {
  static __m512 times_half(__m128i bytes, const uint8_t* half) {
    return _mm512_mul_ps(Avx512::half(half), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  }
  static __m512 scales(const uint8_t* p) {
    return times_half(Codes256<T>::scale_bytes(p), p + Codes256<T>::kScale);
  }
  static void scales(const uint8_t* p, __m512& scale, __m512& subtracted) {
    scale = subtracted = scales(p);
    if constexpr (Parts<T>::kHasMin) {
      subtracted = times_half(Codes256<T>::minimum_bytes(p), p + Codes256<T>::kMinimum);
    }
  }
};
template <>
struct Halves<blocks::Q6_K> : ScalesOf16<blocks::Q6_K> {
  static void codes(const uint8_t* p, int half, __m512i (&out)[2]) {
    const __m512i packed = _mm512_loadu_si512(p + 64 * half), nibble = _mm512_set1_epi8(15);
    const uint8_t* high = p + 128 + 32 * half;
    out[0] = on_top(_mm512_and_si512(packed, nibble), rotated(high, -4, -2), 0x30);
    out[1] = on_top(_mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble), rotated(high, 0, 2), 0x30);
  }
};
template <>
struct Halves<blocks::Q3_K> : ScalesOf16<blocks::Q3_K> {
  static void codes(const uint8_t* p, int half, __m512i (&out)[2]) {
    for (int i = 0; i < 2; i++) {
      const __m512i two = rotated(p + 32 + 32 * half, 4 * i, 4 * i + 2);
      const int64_t plane = 4 * half + 2 * i;
      out[i] = on_top(_mm512_and_si512(two, _mm512_set1_epi8(3)), rotated(p, plane - 2, plane - 1), 4);
    }
  }
};
template <>
struct Halves<blocks::Q2_K> : ScalesOf16<blocks::Q2_K> {
  static void codes(const uint8_t* p, int half, __m512i (&out)[2]) {
    for (int i = 0; i < 2; i++) {
      out[i] = _mm512_and_si512(rotated(p + 16 + 32 * half, 4 * i, 4 * i + 2), _mm512_set1_epi8(3));
    }
  }
};

}  // namespace
}  // namespace kvfold
