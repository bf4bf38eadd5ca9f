// Codes and scales of a block as 256-bit vectors: what row dots and panels (avx2_dots.h), rows to float32
// (avx2_decode.h) and rows side by side begin with.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/quant_types.h"
#include "simd/avx2.h"

namespace kvfold {
namespace {

// What has vector code here: types of one float16 and 32 weights, by codes() of a block, and types of 256, by
// eight vectors of codes() and scales() and minimums of their runs, eight a vector. Codes that need all of
// int8 are levels, others have Parts<T>::kZero on top.
struct NoCodes {};
template <class T>
struct Codes32 : NoCodes {};
template <class T>
struct Codes256 : NoCodes {};

template <class T>
constexpr bool kHas32 = !std::is_base_of_v<NoCodes, Codes32<T>>;
template <class T>
constexpr bool kHas256 = !std::is_base_of_v<NoCodes, Codes256<T>>;
template <class T, class Of32, class Of256, class None>
using ByCodes = std::conditional_t<kHas32<T>, Of32, std::conditional_t<kHas256<T>, Of256, None>>;

// Codes as levels and `zero` on top.
template <class T>
inline __m256i on_top_of_levels(int zero, __m256i codes) {
  if constexpr (Parts<T>::kZero == 0) return codes;
  return _mm256_add_epi8(
      codes, _mm256_set1_epi8(static_cast<char>(Parts<T>::kWide ? zero : zero - Parts<T>::kZero)));
}

inline __m256i nibbles(const uint8_t* p) {  // of 16 bytes, low ones first
  const __m256i both = _mm256_broadcastsi128_si256(Avx2::load16(p));
  return _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)),
                          _mm256_set1_epi8(15));
}

template <>
struct Codes32<blocks::Q4_0> {
  static __m256i codes(const uint8_t* p) { return nibbles(p + 2); }
};

// Nibbles, and 16 where a byte of `bits` has the bit that `which` has there.
inline __m256i with_fifth(__m256i nibbles, __m256i bits, __m256i which) {
  const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, which), which);
  return _mm256_or_si256(nibbles, _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
}
// The same for bits in order: those of the lower lane's codes in the bytes `low` and `low` + 1 of the lower
// lane of `bits`, those of the upper lane's in `high` and `high` + 1 of the upper one.
template <int low, int high>
inline __m256i with_fifths(__m256i nibbles, __m256i bits) {
  constexpr int64_t kEach = 0x0101010101010101;
  const __m256i bytes = _mm256_setr_epi64x(low * kEach, (low + 1) * kEach, high * kEach, (high + 1) * kEach);
  return with_fifth(nibbles, _mm256_shuffle_epi8(bits, bytes),
                    _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201)));
}
// The same for the codes 4 quad to 4 quad + 3 of eight rows, whose 32 bits are the lanes of `bits`.
inline __m256i with_fifths_of(int quad, __m256i nibbles, __m256i bits) {
  const __m256i byte =
      _mm256_add_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)),
                      _mm256_set1_epi8(static_cast<char>(quad / 2)));
  return with_fifth(nibbles, _mm256_shuffle_epi8(bits, byte),
                    _mm256_set1_epi32(static_cast<int>(0x08040201u << quad % 2 * 4)));
}

template <>
struct Codes32<blocks::Q4_1> {
  static __m256i codes(const uint8_t* p) { return nibbles(p + 4); }
};
template <int fifths>
struct FiveBits {
  static __m256i codes(const uint8_t* p) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(blocks::load32(p + fifths)));
    return with_fifths<0, 2>(nibbles(p + fifths + 4), bits);
  }
};
template <>
struct Codes32<blocks::Q5_0> : FiveBits<2> {};
template <>
struct Codes32<blocks::Q5_1> : FiveBits<4> {};
template <>
struct Codes32<blocks::IQ4_NL> {
  template <int zero>  // levels and this on top
  static __m128i table() {
    const __m128i levels =
        _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
    return _mm_add_epi8(levels, _mm_set1_epi8(static_cast<char>(zero)));
  }
  template <int zero = 0>
  static __m256i of(__m256i nibbles) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table<zero>()), nibbles);
  }
  static __m256i codes(const uint8_t* p) { return of(nibbles(p + 2)); }
};
template <>
struct Codes32<blocks::Q8_0> {
  static __m256i codes(const uint8_t* p) { return Avx2::load_codes(p + 2); }
};

template <class T>
inline void take_scales(const uint8_t* p, float* scale, float* minimum) {
  constexpr int kVectors = 256 / Parts<T>::kRun / 8;
  __m256 d[kVectors], m[kVectors];
  Codes256<T>::scales(p, d, m);
  for (int i = 0; i < kVectors; i++) {
    Avx2::store(scale + 8 * i, d[i]);
    if constexpr (Parts<T>::kHasMin) Avx2::store(minimum + 8 * i, m[i]);
  }
}

// Eight scales and eight minimums of six bits each, a byte each, out of twelve bytes (decode_blocks.h,
// k_scale), four to a word.
struct SixBits {
  uint64_t scales, minimums;

  explicit SixBits(const uint8_t* packed) {
    const uint32_t first = blocks::load32(packed), second = blocks::load32(packed + 4),
                   third = blocks::load32(packed + 8);
    const uint64_t last_scales = (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030),
                   last_minimums = (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030);
    scales = (first & 0x3f3f3f3f) | last_scales << 32;
    minimums = (second & 0x3f3f3f3f) | last_minimums << 32;
  }
};

// Runs of 32 nibbles with 6-bit scales and minimums, in Q5_K with fifth bits, bit i of a byte for run i.
template <class T>
struct NibbleRuns {
  static constexpr int64_t kNibbles = sizeof(T) - 128, kFifths = 16;  // where they begin
  static constexpr bool kHasFifth = kNibbles > kFifths;

  static void codes(const uint8_t* p, __m256i* out) {
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
      const __m256i packed = Avx2::load_codes(p + kNibbles + 32 * pair);
      out[2 * pair] = _mm256_and_si256(packed, _mm256_set1_epi8(15));
      out[2 * pair + 1] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
    }
    if constexpr (kHasFifth) {
      const __m256i bits = Avx2::load_codes(p + kFifths);
#pragma GCC unroll 8
      for (int run = 0; run < 8; run++) {
        const __m256i fifth = run < 4 ? _mm256_slli_epi16(bits, 4 - run) : _mm256_srli_epi16(bits, run - 4);
        out[run] = _mm256_or_si256(out[run], _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
      }
    }
  }

  // Eight bytes of scales or minimums times the float16 at `half`.
  static __m256 times_half(uint64_t bytes, const uint8_t* half) {
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(_cvtsh_ss(blocks::load16(half))));
  }
  static void scales(const uint8_t* p, __m256* scale, __m256* minimum) {
    const SixBits of_runs(p + 4);
    *scale = times_half(of_runs.scales, p);
    *minimum = times_half(of_runs.minimums, p + 2);
  }
};
template <>
struct Codes256<blocks::Q4_K> : NibbleRuns<blocks::Q4_K> {};
template <>
struct Codes256<blocks::Q5_K> : NibbleRuns<blocks::Q5_K> {};

// Sixteen signed bytes times a float16.
inline void runs_times(float half, __m128i bytes, __m256* out) {
  const __m256 d = _mm256_set1_ps(half);
  out[0] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d);
  out[1] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))), d);
}

// Sixteen runs, a half of them at a time: half_codes() has vectors of two runs each. scale_bytes() and
// minimum_bytes() of all runs times the float16 at kScale and at kMinimum.
template <class T>
struct RunsOf16 {
  static void codes(const uint8_t* p, __m256i* out) {
    for (int half = 0; half < 2; half++) {
      __m256i of_half[4];
      Codes256<T>::half_codes(p, half, of_half);
      std::copy(of_half, of_half + 4, out + 4 * half);
    }
  }
  static void scales(const uint8_t* p, __m256* scale, __m256* minimum) {
    using Of = Codes256<T>;
    runs_times(block_scale(p + Of::kScale), Of::scale_bytes(p), scale);
    if constexpr (Parts<T>::kHasMin) {
      runs_times(block_scale(p + Of::kMinimum), Of::minimum_bytes(p), minimum);
    }
  }
};

template <>
struct Codes256<blocks::Q6_K> : RunsOf16<blocks::Q6_K> {
  static constexpr int64_t kScale = 208;
  static __m128i scale_bytes(const uint8_t* p) { return Avx2::load16(p + 192); }
  static void half_codes(const uint8_t* p, int half, __m256i (&out)[4]) {
    const __m256i nibble = _mm256_set1_epi8(15), top = _mm256_set1_epi8(0x30);
    const __m256i a = Avx2::load_codes(p + 64 * half), b = Avx2::load_codes(p + 64 * half + 32);
    const __m256i high = Avx2::load_codes(p + 128 + 32 * half);
    out[0] = _mm256_or_si256(_mm256_and_si256(a, nibble), _mm256_and_si256(_mm256_slli_epi16(high, 4), top));
    out[1] = _mm256_or_si256(_mm256_and_si256(b, nibble), _mm256_and_si256(_mm256_slli_epi16(high, 2), top));
    out[2] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 4), nibble), _mm256_and_si256(high, top));
    out[3] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(b, 4), nibble),
                             _mm256_and_si256(_mm256_srli_epi16(high, 2), top));
  }
};

// Three bits: two of planes, and one that eight planes have in the same bytes for both halves.
template <>
struct Codes256<blocks::Q3_K> : RunsOf16<blocks::Q3_K> {
  static void half_codes(const uint8_t* p, int half, __m256i (&out)[4]) {
    const __m256i nibble = _mm256_set1_epi8(15), lower = _mm256_set1_epi8(0x33);
    const __m256i two = Avx2::load_codes(p + 32 + 32 * half), planes = Avx2::load_codes(p);
    const __m256i third = _mm256_and_si256(half == 0 ? planes : _mm256_srli_epi16(planes, 4), nibble);
    // Third bits of vectors 0 and 2, or 1 and 3, above their two bits in the nibbles of a byte.
    const auto above = [&](int first) {
      const auto at = [&](int bits) {
        return static_cast<char>((bits >> first & 1) << 2 | (bits >> (first + 2) & 1) << 6);
      };
      const __m128i table = _mm_setr_epi8(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8),
                                          at(9), at(10), at(11), at(12), at(13), at(14), at(15));
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), third);
    };
    const __m256i even = _mm256_or_si256(_mm256_and_si256(two, lower), above(0));
    const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(two, 2), lower), above(1));
    out[0] = _mm256_and_si256(even, nibble);
    out[1] = _mm256_and_si256(odd, nibble);
    out[2] = _mm256_and_si256(_mm256_srli_epi16(even, 4), nibble);
    out[3] = _mm256_and_si256(_mm256_srli_epi16(odd, 4), nibble);
  }

  // Low nibbles of runs 0 to 7, and high ones of runs 8 to 15, in eight bytes; two bits more in four planes.
  static constexpr int64_t kScale = 108;
  static __m128i scale_bytes(const uint8_t* p) {
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 96));
    const __m128i lower = _mm_unpacklo_epi64(both, _mm_srli_epi16(both, 4));
    const __m128i upper =
        _mm_srlv_epi32(_mm_set1_epi32(static_cast<int>(blocks::load32(p + 104))), _mm_setr_epi32(0, 2, 4, 6));
    const __m128i codes = _mm_or_si128(_mm_and_si128(lower, _mm_set1_epi8(15)),
                                       _mm_slli_epi16(_mm_and_si128(upper, _mm_set1_epi8(3)), 4));
    return _mm_sub_epi8(codes, _mm_set1_epi8(32));
  }
};

template <>
struct Codes256<blocks::Q2_K> : RunsOf16<blocks::Q2_K> {
  static void half_codes(const uint8_t* p, int half, __m256i (&out)[4]) {
    const __m256i four = Avx2::load_codes(p + 16 + 32 * half), two = _mm256_set1_epi8(3);
    out[0] = _mm256_and_si256(four, two);
    out[1] = _mm256_and_si256(_mm256_srli_epi16(four, 2), two);
    out[2] = _mm256_and_si256(_mm256_srli_epi16(four, 4), two);
    out[3] = _mm256_and_si256(_mm256_srli_epi16(four, 6), two);
  }

  static constexpr int64_t kScale = 80, kMinimum = 82;
  static __m128i scale_bytes(const uint8_t* p) { return _mm_and_si128(Avx2::load16(p), _mm_set1_epi8(15)); }
  static __m128i minimum_bytes(const uint8_t* p) {
    return _mm_and_si128(_mm_srli_epi16(Avx2::load16(p), 4), _mm_set1_epi8(15));
  }
};

// Eight runs of IQ4_NL, behind a float16 and scales of six bits.
template <>
struct Codes256<blocks::IQ4_XS> {
  static constexpr int64_t kNibbles = sizeof(blocks::IQ4_XS) - 128;  // where they begin

  static void codes(const uint8_t* p, __m256i* out) {
#pragma GCC unroll 8
    for (int run = 0; run < 8; run++) {
      out[run] = Codes32<blocks::IQ4_NL>::of(nibbles(p + kNibbles + 16 * run));
    }
  }

  static void scales(const uint8_t* p, __m256* scale, __m256*) {
    const __m256i lower = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(blocks::load32(p + 4))),
                                            _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i upper = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(blocks::load32(p))),
                                            _mm256_setr_epi32(12, 14, 16, 18, 20, 22, 24, 26));
    const __m256i codes = _mm256_or_si256(_mm256_and_si256(lower, _mm256_set1_epi32(15)),
                                          _mm256_and_si256(upper, _mm256_set1_epi32(0x30)));
    *scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(32))),
                           _mm256_set1_ps(block_scale(p)));
  }
};

// take_apart() of kernels/quant_types.h.
template <class T>
struct TakesApart {
  static constexpr bool kTakeApart = true;

  static void take_apart(const uint8_t* block, int zero, uint8_t* codes, float* scales, float* minimums) {
    if constexpr (kHas32<T>) {
      Avx2::store_codes(codes, on_top_of_levels<T>(zero, Codes32<T>::codes(block)));
      scales[0] = block_scale(block);
      if constexpr (Parts<T>::kHasMin) minimums[0] = -block_scale(block + 2);
    } else {
      take_scales<T>(block, scales, minimums);
      __m256i vectors[8];
      Codes256<T>::codes(block, vectors);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        Avx2::store_codes(codes + 32 * i, on_top_of_levels<T>(zero, vectors[i]));
      }
    }
  }
};

}  // namespace
}  // namespace kvfold
