// The vocabulary of generic.h in 512-bit vectors, and vector code for the types that matter most.
//
// Compiled inside the target region that isa/avx512.cpp opens. VNNI multiplies unsigned by signed codes, so
// levels that need all of int8 become unsigned by adding 128.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/quant_formats.h"

namespace kvfold {
namespace {

struct Avx512 {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kWideZero = 128;
  // 12 sums in int32 and 12 in float32, two vectors of weights, four codes of x: 27 of 32 registers. A row of
  // x is loaded once for two dots, 8 loads for 12 of them; with one vector of weights and 12 rows it is 13
  // for 12.
  static constexpr int kTileVectors = 2, kTileCols = 6;
  static constexpr int kCodeVectors = 2, kCodeCols = 6;
  static constexpr bool kPairSums = false, kNearPanels = false;

  using Floats = __m512;
  using Ints = __m512i;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load_first(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void store_first(float* p, Floats v, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(b, a); }  // of a NaN in a: NaN
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(b, a); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats round(Floats v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // Zero below 2^-126, where scalef would make denormal numbers: slow to multiply on Intel processors.
  static Floats power_of_2(Floats n) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
    return _mm512_maskz_scalef_ps(is_normal, _mm512_set1_ps(1.0f), n);
  }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }

  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Ints set_ints(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints load_codes(const void* p) { return _mm512_loadu_si512(p); }
  static void store_codes(void* p, Ints v) { _mm512_storeu_si512(p, v); }
  static Ints four_codes(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  template <bool wide>
  static Ints dot(Ints sum, Ints w, Ints x) {
    return _mm512_dpbusd_epi32(sum, w, x);
  }
  template <int run>
  static Floats scales_of(const float* scales, int at) {
    const __m512i lane = _mm512_srli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), run == 32 ? 3 : 2);
    return _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scales + at / run));
  }

  // Four rows a vector, one in each quarter.
  static __m512i quarters(const uint8_t* p, int64_t stride) {
    __m512i v = _mm512_castsi128_si512(load16(p));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load16(p + stride));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load16(p + 2 * stride));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, load16(p + 3 * stride));
  }
  static void transpose(const uint8_t* p, int64_t stride, Ints* out) {
    const __m512i a = quarters(p, 4 * stride), b = quarters(p + stride, 4 * stride),
                  c = quarters(p + 2 * stride, 4 * stride), d = quarters(p + 3 * stride, 4 * stride);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
    out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }

  static float quantize(const float* x, int8_t* codes, int32_t* sums) {
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const uint32_t bits =
        _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                                 _mm512_and_si512(_mm512_castps_si512(high), magnitude)));
    float largest;
    std::memcpy(&largest, &bits, 4);
    if (!(bits < 0x7f800000 && largest >= 0x1p-120f)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_setzero_si256());
      sums[0] = sums[1] = 0;
      return bits < 0x7f800000 ? 0.0f : __builtin_nanf("");
    }
    const __m512 inverse = _mm512_set1_ps(127.0f / largest);
    const __m512i whole_low = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)),
                  whole_high = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(whole_low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(whole_high));
    sums[0] = _mm512_reduce_add_epi32(whole_low);
    sums[1] = _mm512_reduce_add_epi32(whole_high);
    return largest / 127.0f;
  }

  static Floats dot_bf16(Floats sum, Ints w, Ints x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static void to_bf16(const float* x, uint16_t* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      const auto rest = static_cast<uint32_t>(n - i < 16 ? n - i : 16);
      const auto mask = static_cast<__mmask16>((1u << rest) - 1);
      const __m256bh halves = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i));
      _mm256_mask_storeu_epi16(out + i, mask, reinterpret_cast<__m256i>(halves));
    }
  }
  // Attention on bfloat16. 24 sums, two vectors of a panel, a word of a row: 27 of 32 registers, 14 loads for
  // 24 dots.
  static constexpr int kPairVectors = 2, kPairRows = 12;
  static constexpr int64_t kPairStep = 1;
  using Number = uint16_t;
  static constexpr int32_t kOnes = 0x3f803f80;
  static void to_numbers(const float* x, Number* out, int64_t n) { to_bf16(x, out, n); }
  static void store_numbers(Number* p, Floats v) { store_bf16(p, v); }
  static Floats add_products(Floats sum, Ints w, Ints x) { return dot_bf16(sum, w, x); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static float largest(Floats v) { return _mm512_reduce_max_ps(v); }
  static __m256i halves(Floats v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
  static Ints bf16_pairs(Floats low, Floats high) {
    const __m512i apart = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // low ones at 0 .. 15, high ones at 16 .. 31
    return _mm512_permutexvar_epi16(
        _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16)), apart);
  }
  static void store_bf16(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(v));
  }
  static Floats load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  // The same where it stands, after what is settled() before: GCC moves all of a loop's to its beginning.
  static void prefetch_here(const void* p) {
    __asm__ volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
  }
  static void settled(Ints& v) { __asm__ volatile("" : "+v"(v)); }

  // Attention over latents. Addresses of 8 keys are a base and multiples of four strides.
  static constexpr int kLatentKeys = 8, kLatentCodeKeys = 16, kLatentColumns = 16;
  static Floats load_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(reinterpret_cast<const uint8_t*>(p))));
  }
  static Ints interleave(const uint16_t* low, const uint16_t* high) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
    return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
  }
  static Ints whole_pairs(Floats low, Floats high) {
    return _mm512_or_si512(_mm512_cvtps_epi32(low), _mm512_slli_epi32(_mm512_cvtps_epi32(high), 16));
  }
  static Ints multiply_shares(Ints a, Ints b) { return _mm512_mulhrs_epi16(a, b); }
  static Ints dot_shorts(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static constexpr int pair_place(int column) { return column; }
  static void pair_bytes(const int8_t* low, const int8_t* high, uint32_t* to) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
    store_codes(to, _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b))));
  }
  // Of 16 blocks: a load of 64 bytes has the scales of two, in the lower half of word 0 and the upper of
  // word 8.
  static Floats sixteen_scales(const uint8_t* row) {
    const __m512i words = _mm512_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24);
    const auto four = [&](int block) {
      return _mm512_permutex2var_epi32(load_codes(row + 34 * block), words,
                                       load_codes(row + 34 * block + 68));
    };
    __m512i v = four(0);
    v = _mm512_mask_mov_epi32(v, 0x00f0, four(4));
    v = _mm512_mask_mov_epi32(v, 0x0f00, four(8));
    v = _mm512_mask_mov_epi32(v, 0xf000, four(12));
    const __m512i upper = _mm512_setr_epi32(0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16);
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srlv_epi32(v, upper)));
  }
  static void q8_scales(const uint8_t* row, int64_t num_blocks, float* scales) {
    int64_t b = 0;
    for (; b + 16 <= num_blocks; b += 16, row += 16 * 34, scales += 16) store(scales, sixteen_scales(row));
    for (; b < num_blocks; b++, row += 34) *scales++ = _cvtsh_ss(blocks::load16(row));
  }
  // Sums of 32 codes plus 128 each, as four words of a half.
  static __m256i eights(const uint8_t* codes) {
    const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm256_sad_epu8(_mm256_xor_si256(c, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  }
  // Where sums of the blocks' codes times codes plus kWideZero start.
  static void q8_starts(const uint8_t* row, int64_t num_blocks, int32_t* starts) {
    int64_t b = 0;
    for (; b + 4 <= num_blocks; b += 4, row += 4 * 34) {
      const __m256i low = _mm256_or_si256(eights(row + 2), _mm256_slli_epi64(eights(row + 36), 32));
      const __m256i high = _mm256_or_si256(eights(row + 70), _mm256_slli_epi64(eights(row + 104), 32));
      const __m256i two =
          _mm256_add_epi32(_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high));
      const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
      const __m128i start = _mm_sub_epi32(_mm_set1_epi32(128 * 128 * 32), _mm_slli_epi32(sums, 7));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(starts + b), start);
    }
    for (; b < num_blocks; b++, row += 34) {
      const __m256i four = eights(row + 2);
      const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
      starts[b] = 128 * 128 * 32 - 128 * _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
    }
  }

  static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m512 half(const uint8_t* p) {  // one float16 into every lane
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(blocks::load16(p))));
  }

  // Distance a row dot reads ahead; the processor's own prefetching stops at 4 KiB. IQ4_NL from memory on a
  // Zen 4 that reads 24 GB/s with one thread and 30 with two, GB/s: nothing read ahead 18 and 26; into the
  // first level, whose 24 buffers then limit it, 16.5 and 24; into the second 20 to 24 and 28. Every line
  // must be asked for: one of 17 left out, of Q8_0 to the second level, were 12 instead of 21 GB/s.
  static constexpr int64_t kAhead = 8192;
};

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
  static __m512i table() {
    const __m128i levels =
        _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
    return _mm512_broadcast_i32x4(_mm_xor_si128(levels, _mm_set1_epi8(-128)));
  }
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
  return _mm512_xor_si512(Nibbles<blocks::IQ4_NL>::table(), _mm512_set1_epi8(-128));
}

// Fifth bits of Q5_0 and Q5_1, one at any place of its 64-bit lane for each byte, onto nibbles: `place` is
// where it is less 4.
inline __m512i with_fifths(__m512i nibbles, __m512i bits, __m512i place) {
  const __m512i fourth = _mm512_multishift_epi64_epi8(place, bits);
  return _mm512_ternarylogic_epi32(nibbles, fourth, _mm512_set1_epi8(16), 0xf8);  // | (fourth & 16)
}

// 32 nibbles under one float16, or two, the second the minimum, with fifth bits before them in Q5_0 and Q5_1.
template <class T>
struct FastNibbles {
  static constexpr bool kDot = true, kUnpack = true, kQuads = false, kTakeApart = false;
  static constexpr bool kHasMin = Parts<T>::kHasMin;
  static constexpr int64_t kBytes = sizeof(T), kNibbles = kBytes - 16,
                           kFifths = kHasMin ? 4 : 2;  // where they begin
  static constexpr bool kHasFifth = kNibbles > kFifths;
  // Of 128 codes: the low nibbles of four blocks side by side, then the high ones. Both have the same scales
  // a lane.
  static constexpr int place(int piece) { return piece % 2 * 4 + piece / 2; }
  // What is subtracted: this times the minimums, or scales where there are none, times the sums of x.
  static constexpr float kZero = kHasMin ? -1.0f : Format<Avx512, T>::kZero;

  // Of 16 blocks. load(at) has the 64 bytes after byte `at` of them.
  struct Scales {
    __m512 scale, zero;  // what kZero is multiplied by
  };
  template <class Load>
  static Scales scales_from(const Load& load) {
    if constexpr (kBytes == 18) {  // word 9 i of 64 is the scale of block i, for 8 blocks a pair of vectors
      const __m512i spread = _mm512_castsi256_si512(
          _mm256_setr_epi32(0 | 9 << 16, 18 | 27 << 16, 36 | 45 << 16, 54 | 63 << 16, 0, 0, 0, 0));
      const __m512i first = _mm512_permutex2var_epi16(load(0), spread, load(64));
      const __m512i second = _mm512_permutex2var_epi16(load(8 * kBytes), spread, load(8 * kBytes + 64));
      const __m512 scale = _mm512_cvtph_ps(
          _mm256_inserti128_si256(_mm512_castsi512_si256(first), _mm512_castsi512_si128(second), 1));
      return {scale, scale};
    } else {  // three blocks begin within 64 bytes, the last block in the last 64
      constexpr int each = 0x01010101, i = kBytes * each, j = 2 * i, last = (64 - kBytes) * each;
      const __m512i bytes =
          _mm512_add_epi8(_mm512_set1_epi32(0x03020100),
                          _mm512_setr_epi32(0, i, j, 0, i, j, 0, i, j, 0, i, j, 0, i, j, last));
      __m512i heads = _mm512_permutexvar_epi8(bytes, load(0));
#pragma GCC unroll 5
      for (int turn = 1; turn < 6; turn++) {
        const int64_t at = turn < 5 ? 3 * turn * kBytes : 16 * kBytes - 64;
        heads = _mm512_mask_permutexvar_epi8(heads, ~uint64_t{0} << 12 * turn, bytes, load(at));
      }
      const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(heads));
      if constexpr (!kHasMin) return {scale, scale};
      return {scale, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(heads, 16)))};
    }
  }
  static Scales scales(const uint8_t* p) {
    return scales_from([&](int64_t at) { return _mm512_loadu_si512(p + at); });
  }
  // Of fewer than 16; nothing after them is read.
  static Scales scales(const uint8_t* p, int64_t count) {
    return scales_from([&](int64_t at) {  // zeros after the last block
      const int64_t bytes = std::clamp<int64_t>(count * kBytes - at, 0, 64);
      const uint64_t mask = bytes == 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
      return _mm512_maskz_loadu_epi8(mask, p + at);
    });
  }

  // Four blocks side by side: nibbles, and the fifth bits of a block in both halves of each 64-bit lane of
  // its quarter. 64 bytes have all of three blocks.
  struct Four {
    __m512i nibbles, fifth;
  };
  // Bytes of a block for each quarter, in the 64 bytes that begin with such a byte.
  static __m512i of_three(__m512i bytes) {
    constexpr int64_t each = 0x0101010101010101, i = kBytes * each, j = 2 * i;
    return _mm512_add_epi8(bytes, _mm512_setr_epi64(0, 0, i, i, j, j, 0, 0));
  }
  static Four side_by_side(const uint8_t* p) {
    const __m512i in_order = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0f0e0d0c0b0a0908, 0x0706050403020100));
    const uint8_t* last = p + 3 * kBytes;
    const __m512i three = _mm512_permutexvar_epi8(of_three(in_order), _mm512_loadu_si512(p + kNibbles));
    Four four = {_mm512_mask_broadcast_i32x4(three, 0xf000, Avx512::load16(last + kNibbles)),
                 _mm512_setzero_si512()};
    if constexpr (kHasFifth) {
      const __m512i word = _mm512_set1_epi32(0x03020100);
      const __m512i words = _mm512_permutexvar_epi8(of_three(word), _mm512_loadu_si512(p + kFifths));
      four.fifth = _mm512_mask_set1_epi32(words, 0xf000, static_cast<int>(blocks::load32(last + kFifths)));
    }
    return four;
  }
  static Four side_by_side(const uint8_t* p, int64_t count) {  // of fewer than four
    uint8_t blocks[4 * kBytes] = {};
    std::memcpy(blocks, p, count * kBytes);
    return side_by_side(blocks);
  }
  static __m512i low(const Four& of) {
    if constexpr (!kHasFifth) return Nibbles<T>::low(of.nibbles);
    return with_fifths(Nibbles<T>::low(of.nibbles), of.fifth, fifth_places(0));
  }
  static __m512i high(const Four& of) {
    if constexpr (!kHasFifth) return Nibbles<T>::high(of.nibbles);
    return with_fifths(Nibbles<T>::high(of.nibbles), of.fifth, fifth_places(16));
  }
  static __m512i fifth_places(char first) {  // of 16 bits from bit `first`, less 4, modulo 64
    const __m128i places = _mm_setr_epi8(60, 61, 62, 63, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11);
    return _mm512_add_epi8(_mm512_broadcast_i32x4(places), _mm512_set1_epi8(first));
  }

  // The codes 4 quad to 4 quad + 3 of 16 rows, a lane each: nibbles, with their fifth bits out of the
  // rows' 32.
  template <bool is_signed>
  static __m512i quad_codes(__m512i nibbles, __m512i bits, int quad) {
    if constexpr (kHasFifth) {
      const __m512i places =
          _mm512_set1_epi64(0x1f1e1d1c3f3e3d3c);  // of bits 0 to 3 of both lanes' 32, less 4
      const __m512i codes =
          with_fifths(nibbles, bits, _mm512_add_epi8(places, _mm512_set1_epi8(static_cast<char>(4 * quad))));
      return is_signed ? _mm512_sub_epi8(codes, _mm512_set1_epi8(Format<Avx512, T>::kZero)) : codes;
    }
    return nibbles;
  }

  template <int rows>
  static void add_four(const Four& blocks, const __m512 (&scale)[rows], __m512i lanes, const DotRow* x,
                       int64_t at, __m512 (&sum)[rows]) {
    const __m512i first = low(blocks), second = high(blocks);
    for (int r = 0; r < rows; r++) {
      __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, Avx512::load_codes(x[r].codes + at));
      dot = _mm512_dpbusd_epi32(dot, second, Avx512::load_codes(x[r].codes + at + 64));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale[r]), sum[r]);
    }
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i steps[4] = {lanes, _mm512_add_epi32(lanes, _mm512_set1_epi32(4)),
                              _mm512_add_epi32(lanes, _mm512_set1_epi32(8)),
                              _mm512_add_epi32(lanes, _mm512_set1_epi32(12))};
    __m512 sum[rows], minus[rows], scale[rows];
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm512_setzero_ps();
    const int64_t num_blocks = k / 32;
    int64_t block = 0;
    for (; block + 16 <= num_blocks; block += 16) {
      const uint8_t* p = row + block * kBytes;
      const Scales d = scales(p);
      for (int r = 0; r < rows; r++) {
        scale[r] = _mm512_mul_ps(d.scale, _mm512_loadu_ps(x[r].scales + block));
        minus[r] = _mm512_fmadd_ps(d.zero, _mm512_loadu_ps(x[r].sums + block), minus[r]);
      }
#pragma GCC unroll 4
      for (int64_t line = 4; 64 * line < 16 * kBytes; line++) Avx512::prefetch(p + ahead + 64 * line);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Avx512::prefetch(p + ahead + 64 * i);
        add_four<rows>(side_by_side(p + 4 * i * kBytes), scale, steps[i], x, 32 * (block + 4 * i), sum);
      }
    }
    if (block < num_blocks) {
      const int64_t count = num_blocks - block;
      const uint8_t* p = row + block * kBytes;
      const Scales d = scales(p, count);
      for (int r = 0; r < rows; r++) {
        scale[r] = _mm512_mul_ps(d.scale, _mm512_loadu_ps(x[r].scales + block));
        minus[r] = _mm512_fmadd_ps(d.zero, _mm512_loadu_ps(x[r].sums + block), minus[r]);
      }
      for (int64_t i = 0; i < count; i += 4) {
        Avx512::prefetch(p + ahead + i * kBytes);
        Avx512::prefetch(p + ahead + i * kBytes + 64);
        const uint8_t* from = p + i * kBytes;
        const Four blocks = i + 4 <= count ? side_by_side(from) : side_by_side(from, count - i);
        add_four<rows>(blocks, scale, steps[i / 4], x, 32 * (block + i), sum);
      }
    }
    for (int r = 0; r < rows; r++) {
      y[r] = _mm512_reduce_add_ps(_mm512_fnmadd_ps(minus[r], _mm512_set1_ps(kZero), sum[r]));
    }
  }

  template <bool is_signed = false>
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    using Codes = std::conditional_t<is_signed && !kHasFifth && !kHasMin, SignedNibbles<T>, Nibbles<T>>;
    constexpr int64_t kRows = 32, kFields = kHasMin ? 2 : 1, kRecord = 32 * kRows + 4 * kRows * kFields;
    for (int64_t block = 0; block < k / 32; block++, raw += kBytes, panel += kRecord) {
      // Written well before vectors of them are loaded, which waits until every part is in the cache.
      alignas(64) uint16_t halves[kFields][kRows];
      [[maybe_unused]] alignas(64) uint32_t fifths[kRows];
      for (int64_t i = 0; i < kRows; i++) {
        const uint8_t* row = raw + i * row_bytes;
        for (int64_t field = 0; field < kFields; field++) halves[field][i] = blocks::load16(row + 2 * field);
        if constexpr (kHasFifth) fifths[i] = blocks::load32(row + kFifths);
      }
      for (int64_t v = 0; v < 2; v++) {
        __m512i packed[4], bits = _mm512_setzero_si512();
        Avx512::transpose(raw + 16 * v * row_bytes + kNibbles, row_bytes, packed);
        if constexpr (kHasFifth) bits = _mm512_load_si512(fifths + 16 * v);
        for (int j = 0; j < 4; j++) {
          const auto put = [&](int quad, __m512i nibbles) {
            _mm512_store_si512(panel + (2 * quad + v) * 64, quad_codes<is_signed>(nibbles, bits, quad));
          };
          put(j, Codes::low(packed[j]));
          put(4 + j, Codes::high(packed[j]));
        }
      }
      // A minimum is minus the second float16, and a panel has it negated.
      auto* to = reinterpret_cast<float*>(panel + 32 * kRows);
      for (int64_t field = 0; field < kFields; field++) {
        for (int64_t i = 0; i < kRows; i += 16, to += 16) {
          _mm512_store_ps(to, Avx512::load_half(reinterpret_cast<const uint8_t*>(halves[field] + i)));
        }
      }
    }
  }
};
template <>
struct Fast<Avx512, blocks::Q4_0> : FastNibbles<blocks::Q4_0> {};
template <>
struct Fast<Avx512, blocks::Q4_1> : FastNibbles<blocks::Q4_1> {};
template <>
struct Fast<Avx512, blocks::Q5_0> : FastNibbles<blocks::Q5_0> {};
template <>
struct Fast<Avx512, blocks::Q5_1> : FastNibbles<blocks::Q5_1> {};
template <>
struct Fast<Avx512, blocks::IQ4_NL> : FastNibbles<blocks::IQ4_NL> {};

// 32 signed bytes under one float16: 34 bytes a block.
template <>
struct Fast<Avx512, blocks::Q8_0> {
  static constexpr bool kDot = true, kUnpack = true, kQuads = false, kTakeApart = false;
  static constexpr int64_t kBytes = 34;
  static constexpr int place(int piece) { return piece; }

  // Two blocks side by side, unsigned.
  static __m512i two(const uint8_t* p) {
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)));
    const __m512i both =
        _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kBytes + 2)), 1);
    return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
  }

  // The scales of 4 blocks: words 0, 17, 34 and 51 of 64.
  static __m128i scales(const uint8_t* p) {
    const __m512i spread = _mm512_castsi128_si512(_mm_setr_epi32(0 | 17 << 16, 34 | 51 << 16, 0, 0));
    return _mm512_castsi512_si128(
        _mm512_permutex2var_epi16(_mm512_loadu_si512(p), spread, _mm512_loadu_si512(p + 64)));
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    __m512 sum[rows], minus[rows];
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm512_setzero_ps();
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i next = _mm512_add_epi32(lanes, _mm512_set1_epi32(2));
    const int64_t num_blocks = k / 32;
    int64_t block = 0;
    const uint8_t* p = row;
    for (; block + 4 <= num_blocks; block += 4, p += 4 * kBytes) {
      const __m512 d = _mm512_castps128_ps512(_mm_cvtph_ps(scales(p)));
      Avx512::prefetch(p + ahead);
      Avx512::prefetch(p + ahead + 64);
      Avx512::prefetch(p + ahead + 128);
      const __m512i first = two(p), second = two(p + 2 * kBytes);
      for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_castps128_ps512(_mm_loadu_ps(x[r].scales + block)));
        minus[r] = _mm512_castps128_ps512(_mm_fmadd_ps(
            _mm512_castps512_ps128(d), _mm_loadu_ps(x[r].sums + block), _mm512_castps512_ps128(minus[r])));
        const int8_t* codes = x[r].codes + 32 * block;
        const __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, Avx512::load_codes(codes));
        const __m512i b = _mm512_dpbusd_epi32(_mm512_setzero_si512(), second, Avx512::load_codes(codes + 64));
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_permutexvar_ps(lanes, scale), sum[r]);
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_permutexvar_ps(next, scale), sum[r]);
      }
    }
    float rest[rows] = {};
    for (; block < num_blocks; block++, p += kBytes) {
      const float d = blocks::half_at(p);
      const __m256i codes = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)),
                                             _mm256_set1_epi8(-128));
      for (int r = 0; r < rows; r++) {
        const __m256i dot = _mm256_dpbusd_epi32(
            _mm256_setzero_si256(), codes,
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[r].codes + 32 * block)));
        const auto total = static_cast<float>(_mm512_reduce_add_epi32(_mm512_zextsi256_si512(dot)));
        rest[r] += d * (x[r].scales[block] * total - 128.0f * x[r].sums[block]);
      }
    }
    for (int r = 0; r < rows; r++) {
      const __m512 zeros = _mm512_maskz_mov_ps(0x000f, minus[r]);
      y[r] = rest[r] + _mm512_reduce_add_ps(_mm512_fnmadd_ps(zeros, _mm512_set1_ps(128.0f), sum[r]));
    }
  }

  template <bool is_signed = false>
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    const __m512i change = _mm512_set1_epi8(is_signed ? 0 : -128);
    for (int64_t block = 0; block < k / 32; block++, raw += kBytes, panel += 32 * 36) {
      alignas(64) uint16_t halves[32];
      for (int64_t i = 0; i < 32; i++) halves[i] = blocks::load16(raw + i * row_bytes);
      for (int v = 0; v < 2; v++) {
        for (int half = 0; half < 2; half++) {
          __m512i quads[4];
          Avx512::transpose(raw + 16 * v * row_bytes + 2 + 16 * half, row_bytes, quads);
          for (int j = 0; j < 4; j++) {
            _mm512_store_si512(panel + (2 * (4 * half + j) + v) * 64, _mm512_xor_si512(quads[j], change));
          }
        }
      }
      auto* to = reinterpret_cast<float*>(panel + 32 * 32);
      for (int v = 0; v < 2; v++) {
        _mm512_store_ps(
            to + 16 * v,
            _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves + 16 * v))));
      }
    }
  }
};

// 16 rows of `count` numbers, to[j] = number j of all rows.
inline void transpose_floats(const float* rows, int64_t stride, int64_t count, __m512* to) {
  for (int64_t j = 0; j < count; j += 4) {
    __m512i columns[4];
    Avx512::transpose(reinterpret_cast<const uint8_t*>(rows + j), stride * 4, columns);
    for (int64_t c = 0; c < 4; c++) to[j + c] = _mm512_castsi512_ps(columns[c]);
  }
}

// 256 nibbles, eight runs of 32 with 6-bit scales and minimums: 144 bytes.
template <>
struct Fast<Avx512, blocks::Q4_K> {
  static constexpr bool kDot = true, kUnpack = true, kQuads = false, kTakeApart = false;
  // The 64 bytes of two pairs of runs are the low nibbles of runs 0 and 2, and the high ones of 1 and 3.
  static constexpr int place(int piece) { return piece / 2 % 2 * 4 + piece / 4 * 2 + piece % 2; }

  // The eight 6-bit scales in the low, the minimums in the high half of a vector of bytes.
  static __m128i small(const uint8_t* packed) {
    uint32_t a, b, c;
    std::memcpy(&a, packed, 4);
    std::memcpy(&b, packed + 4, 4);
    std::memcpy(&c, packed + 8, 4);
    const uint32_t scales = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
    const uint32_t minimums = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
    return _mm_set_epi64x(static_cast<int64_t>(static_cast<uint64_t>(minimums) << 32 | (b & 0x3f3f3f3f)),
                          static_cast<int64_t>(static_cast<uint64_t>(scales) << 32 | (a & 0x3f3f3f3f)));
  }
  // d times the scales, then dmin times the minimums.
  static __m512 scales(const uint8_t* p) {
    uint32_t both;
    std::memcpy(&both, p, 4);
    const __m128 halves = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(both)));
    const __m512 d = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_broadcastss_ps(halves)),
                                        _mm256_broadcastss_ps(_mm_movehdup_ps(halves)), 1);
    return _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(small(p + 4))));
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum[rows];
    __m256 minus[rows];
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps(), minus[r] = _mm256_setzero_ps();
    for (int64_t at = 0; at < k; at += 256, row += sizeof(blocks::Q4_K)) {
      Avx512::prefetch(row + ahead);
      Avx512::prefetch(row + ahead + 64);
      Avx512::prefetch(row + ahead + 128);
      const __m512 both = scales(row);
      __m512 scale[rows];
      for (int r = 0; r < rows; r++) {
        const __m256 x_scales = _mm256_loadu_ps(x[r].scales + at / 32);
        scale[r] = _mm512_castps256_ps512(_mm256_mul_ps(_mm512_castps512_ps256(both), x_scales));
        minus[r] =
            _mm256_fmadd_ps(_mm512_extractf32x8_ps(both, 1), _mm256_loadu_ps(x[r].sums + at / 32), minus[r]);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512i packed = _mm512_loadu_si512(row + 16 + 64 * half);
        const __m512i low = _mm512_and_si512(packed, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
        const __m512i even = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * half));
        const __m512i odd = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * half + 1));
        for (int r = 0; r < rows; r++) {
          const int8_t* codes = x[r].codes + at + 128 * half;
          const __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, Avx512::load_codes(codes));
          const __m512i b = _mm512_dpbusd_epi32(_mm512_setzero_si512(), high, Avx512::load_codes(codes + 64));
          sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_permutexvar_ps(even, scale[r]), sum[r]);
          sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_permutexvar_ps(odd, scale[r]), sum[r]);
        }
      }
    }
    for (int r = 0; r < rows; r++) {
      y[r] = _mm512_reduce_add_ps(_mm512_sub_ps(sum[r], _mm512_zextps256_ps512(minus[r])));
    }
  }

  template <bool is_signed = false>  // the same: there are no negative codes
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    constexpr int64_t kRecord = 32 * 32 + 2 * 128;
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t at = 0; at < k; at += 256, raw += sizeof(blocks::Q4_K), panel += 8 * kRecord) {
      for (int v = 0; v < 2; v++) {
        const uint8_t* rows = raw + 16 * v * row_bytes;
        alignas(64) float numbers[16][16];
        const __m512 negative =
            _mm512_insertf32x8(_mm512_setzero_ps(), _mm256_set1_ps(-0.0f), 1);  // the minimums
        for (int64_t i = 0; i < 16; i++)
          _mm512_store_ps(numbers[i], _mm512_xor_ps(scales(rows + i * row_bytes), negative));
        __m512 columns[16];
        transpose_floats(numbers[0], 16, 16, columns);
        for (int run = 0; run < 8; run++) {
          auto* to = reinterpret_cast<float*>(panel + run * kRecord + 32 * 32) + 16 * v;
          _mm512_store_ps(to, columns[run]);
          _mm512_store_ps(to + 32, columns[8 + run]);
        }
        for (int pair = 0; pair < 4; pair++) {
          for (int half = 0; half < 2; half++) {
            __m512i packed[4];
            Avx512::transpose(rows + 16 + 32 * pair + 16 * half, row_bytes, packed);
            for (int j = 0; j < 4; j++) {
              uint8_t* to = panel + 2 * pair * kRecord + (2 * (4 * half + j) + v) * 64;
              _mm512_store_si512(to, _mm512_and_si512(packed[j], nibble));
              _mm512_store_si512(to + kRecord, _mm512_and_si512(_mm512_srli_epi16(packed[j], 4), nibble));
            }
          }
        }
      }
    }
  }
};

// 256 codes of 6 bits, sixteen runs of 16 with int8 scales: 210 bytes.
template <>
struct Fast<Avx512, blocks::Q6_K> {
  static constexpr bool kDot = true, kUnpack = true, kQuads = false, kTakeApart = false;
  static constexpr int place(int piece) { return piece; }

  static __m512 scales(const uint8_t* p) {
    return _mm512_mul_ps(Avx512::half(p + 208),
                         _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Avx512::load16(p + 192))));
  }
  // low | the bits of `high` that belong on top.
  static __m512i on_top(__m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(0x30), 0xf8);  // low | (high & 0x30)
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i up = _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2),
                  down = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512 sum[rows], minus[rows];
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm512_setzero_ps();
    for (int64_t at = 0; at < k; at += 256, row += sizeof(blocks::Q6_K)) {
      for (int line = 0; line < 4; line++) Avx512::prefetch(row + ahead + 64 * line);
      const __m512 d = scales(row);
      __m512 scale[rows];
      for (int r = 0; r < rows; r++) {
        scale[r] = _mm512_mul_ps(d, _mm512_loadu_ps(x[r].scales + at / 16));
        minus[r] = _mm512_fmadd_ps(d, _mm512_loadu_ps(x[r].sums + at / 16), minus[r]);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512i packed = _mm512_loadu_si512(row + 64 * half);
        const __m512i high = _mm512_broadcast_i64x4(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 128 + 32 * half)));
        const __m512i first = on_top(_mm512_and_si512(packed, nibble), _mm512_sllv_epi64(high, up));
        const __m512i second =
            on_top(_mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble), _mm512_srlv_epi64(high, down));
        const __m512i a_lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(8 * half));
        const __m512i b_lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(8 * half + 4));
        for (int r = 0; r < rows; r++) {
          const int8_t* codes = x[r].codes + at + 128 * half;
          const __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, Avx512::load_codes(codes));
          const __m512i b =
              _mm512_dpbusd_epi32(_mm512_setzero_si512(), second, Avx512::load_codes(codes + 64));
          sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_permutexvar_ps(a_lanes, scale[r]), sum[r]);
          sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_permutexvar_ps(b_lanes, scale[r]), sum[r]);
        }
      }
    }
    for (int r = 0; r < rows; r++) {
      y[r] = _mm512_reduce_add_ps(_mm512_fnmadd_ps(minus[r], _mm512_set1_ps(32.0f), sum[r]));
    }
  }

  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    constexpr int64_t kRecord = 32 * 32 + 2 * 128;
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t at = 0; at < k; at += 256, raw += sizeof(blocks::Q6_K), panel += 8 * kRecord) {
      for (int v = 0; v < 2; v++) {
        const uint8_t* rows = raw + 16 * v * row_bytes;
        alignas(64) float numbers[16][16];
        for (int64_t i = 0; i < 16; i++) _mm512_store_ps(numbers[i], scales(rows + i * row_bytes));
        __m512 columns[16];
        transpose_floats(numbers[0], 16, 16, columns);
        for (int run = 0; run < 16; run++) {
          _mm512_store_ps(
              reinterpret_cast<float*>(panel + run / 2 * kRecord + 32 * 32) + run % 2 * 32 + 16 * v,
              columns[run]);
        }
        for (int half = 0; half < 2; half++) {
          for (int part = 0; part < 2; part++) {  // 16 of the 32 bytes of upper bits
            __m512i high[4];
            Avx512::transpose(rows + 128 + 32 * half + 16 * part, row_bytes, high);
            for (int side = 0; side < 2; side++) {  // runs of 32: `side` and `side` + 2 of this half
              __m512i packed[4];
              Avx512::transpose(rows + 64 * half + 32 * side + 16 * part, row_bytes, packed);
              for (int j = 0; j < 4; j++) {
                uint8_t* to = panel + (4 * half + side) * kRecord + (2 * (4 * part + j) + v) * 64;
                const __m512i top = side == 0 ? _mm512_slli_epi16(high[j], 4) : _mm512_slli_epi16(high[j], 2);
                const __m512i bottom = side == 0 ? high[j] : _mm512_srli_epi16(high[j], 2);
                _mm512_store_si512(to, on_top(_mm512_and_si512(packed[j], nibble), top));
                _mm512_store_si512(to + 2 * kRecord,
                                   on_top(_mm512_and_si512(_mm512_srli_epi16(packed[j], 4), nibble), bottom));
              }
            }
          }
        }
      }
    }
  }
};

// Rows to float32. A permutation looks at the low four bits of an index, so nibbles need no masking.
template <class T>
struct DecodeNibbles;  // levels()

template <>
struct DecodeNibbles<blocks::Q4_0> {
  static __m512 levels() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }
};
template <>
struct DecodeNibbles<blocks::IQ4_NL> {
  static __m512 levels() {
    return _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
  }
};

template <class T>
struct Decode18 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    const __m512 levels = DecodeNibbles<T>::levels();
    for (const float* end = out + k; out < end; out += 32, p += 18) {
      const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(p + 2));
      const __m512 d = Avx512::half(p);
      _mm512_storeu_ps(out, _mm512_mul_ps(d, _mm512_permutexvar_ps(packed, levels)));
      const __m512i high = _mm512_srli_epi32(packed, 4);
      _mm512_storeu_ps(out + 16, _mm512_mul_ps(d, _mm512_permutexvar_ps(high, levels)));
    }
  }
};
template <>
struct FastDecode<Avx512, blocks::Q4_0> : Decode18<blocks::Q4_0> {};
template <>
struct FastDecode<Avx512, blocks::IQ4_NL> : Decode18<blocks::IQ4_NL> {};

template <>
struct FastDecode<Avx512, blocks::Q8_0> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    for (const float* end = out + k; out < end; out += 32, p += 34) {
      const __m512 d = Avx512::half(p);
      const auto* codes = reinterpret_cast<const int8_t*>(p + 2);
      _mm512_storeu_ps(out, _mm512_mul_ps(d, Avx512::load_bytes(codes)));
      _mm512_storeu_ps(out + 16, _mm512_mul_ps(d, Avx512::load_bytes(codes + 16)));
    }
  }
};

// Two vectors of levels of a block of 32.
template <class T>
struct Levels32 {
  static constexpr int64_t kBytes = sizeof(T);
  static void two(const uint8_t* block, __m512 table, __m512* to) {
    const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(block + 2));
    to[0] = _mm512_permutexvar_ps(packed, table);
    to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), table);
  }
  static __m512 table() { return DecodeNibbles<T>::levels(); }
};
template <>
struct Levels32<blocks::Q8_0> {
  static constexpr int64_t kBytes = sizeof(blocks::Q8_0);
  static void two(const uint8_t* block, __m512, __m512* to) {
    const auto* codes = reinterpret_cast<const int8_t*>(block + 2);
    to[0] = Avx512::load_bytes(codes);
    to[1] = Avx512::load_bytes(codes + 16);
  }
  static __m512 table() { return _mm512_setzero_ps(); }
};

template <class T>
struct Fold32 {
  using Levels = Levels32<T>;
  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    const int64_t lines = (16 * Levels::kBytes + 63) / 64;  // of 16 blocks
    const __m512 table = Levels::table(), factors = _mm512_loadu_ps(x);
    // Scales of some blocks first: a vector of what was just stored in pieces waits until it is in the cache.
    constexpr int64_t kBlocks = 16;
    alignas(32) uint16_t halves[kBlocks][16];
    alignas(64) float scaled[kBlocks][16];
    for (int64_t at = 0; at < k / 32; at++, out += 32, rows += Levels::kBytes) {
      if (at % kBlocks == 0) {
        const int64_t n = std::min(kBlocks, k / 32 - at);
        for (int64_t j = 0; j < 16; j++) {
          for (int64_t b = 0; b < n; b++) {
            halves[b][j] = blocks::load16(rows + j * row_bytes + b * Levels::kBytes);
          }
        }
        for (int64_t b = 0; b < n; b++) {
          const __m512 scales =
              _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves[b])));
          _mm512_store_ps(scaled[b], _mm512_mul_ps(scales, factors));
        }
      }
      for (int64_t line = 0; line < lines; line++, next += 64) Avx512::prefetch(next);
      __m512 sum[2][2] = {{_mm512_loadu_ps(out), _mm512_loadu_ps(out + 16)},
                          {_mm512_setzero_ps(), _mm512_setzero_ps()}};
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; j++) {
        const uint8_t* block = rows + j * row_bytes;
        __m512 levels[2];
        Levels::two(block, table, levels);
        const __m512 factor = _mm512_set1_ps(scaled[at % kBlocks][j]);
        for (int v = 0; v < 2; v++) sum[j % 2][v] = _mm512_fmadd_ps(factor, levels[v], sum[j % 2][v]);
      }
      for (int v = 0; v < 2; v++) _mm512_storeu_ps(out + 16 * v, _mm512_add_ps(sum[0][v], sum[1][v]));
    }
  }
};
template <>
struct FastFold<Avx512, blocks::Q4_0> : Fold32<blocks::Q4_0> {};
template <>
struct FastFold<Avx512, blocks::IQ4_NL> : Fold32<blocks::IQ4_NL> {};
template <>
struct FastFold<Avx512, blocks::Q8_0> : Fold32<blocks::Q8_0> {};

template <>
struct FastDecode<Avx512, blocks::Q4_K> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (const float* end = out + k; out < end; p += sizeof(blocks::Q4_K)) {
      alignas(64) float both[16];
      _mm512_store_ps(both, Fast<Avx512, blocks::Q4_K>::scales(p));
      for (int pair = 0; pair < 4; pair++, out += 64) {
        for (int half = 0; half < 2; half++) {
          const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(p + 16 + 32 * pair + 16 * half));
          const auto value = [&](__m512i codes, int run) {  // scale * code is exact
            return _mm512_fmsub_ps(_mm512_set1_ps(both[run]), _mm512_permutexvar_ps(codes, levels),
                                   _mm512_set1_ps(both[8 + run]));
          };
          _mm512_storeu_ps(out + 16 * half, value(packed, 2 * pair));
          _mm512_storeu_ps(out + 32 + 16 * half, value(_mm512_srli_epi32(packed, 4), 2 * pair + 1));
        }
      }
    }
  }
};

// The minimums of a run, times x, are one number for its 32 columns.
template <>
struct FastFold<Avx512, blocks::Q4_K> {
  static constexpr int64_t kBytes = sizeof(blocks::Q4_K), kRows = 16;

  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    constexpr int64_t kQuarter = kRows * kBytes / 4;  // of 16 blocks: nine lines, for two runs
    for (const float* end = out + k; out < end; rows += kBytes) {
      alignas(64) float scaled[kRows][16], totals[16];  // of 8 scales and 8 minimums
      __m512 total = _mm512_setzero_ps();
      for (int64_t j = 0; j < kRows; j++) {
        const __m512 both =
            _mm512_mul_ps(Fast<Avx512, blocks::Q4_K>::scales(rows + j * row_bytes), _mm512_set1_ps(x[j]));
        _mm512_store_ps(scaled[j], both);
        total = _mm512_add_ps(total, both);
      }
      _mm512_store_ps(totals, total);
      for (int pair = 0; pair < 4; pair++, out += 64, next += kQuarter) {
        for (int64_t at = 0; at < kQuarter; at += 64) Avx512::prefetch(next + at);
        __m512 sum[2][2][2];
#pragma GCC unroll 2
        for (int run = 0; run < 2; run++) {
          const __m512 least = _mm512_set1_ps(totals[8 + 2 * pair + run]);
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            sum[0][run][half] = _mm512_sub_ps(_mm512_loadu_ps(out + 32 * run + 16 * half), least);
            sum[1][run][half] = _mm512_setzero_ps();
          }
        }
#pragma GCC unroll 16
        for (int64_t j = 0; j < kRows; j++) {
          const uint8_t* codes = rows + j * row_bytes + 16 + 32 * pair;
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(codes + 16 * half));
#pragma GCC unroll 2
            for (int run = 0; run < 2; run++) {
              const __m512i nibbles = run == 0 ? packed : _mm512_srli_epi32(packed, 4);
              sum[j % 2][run][half] =
                  _mm512_fmadd_ps(_mm512_set1_ps(scaled[j][2 * pair + run]),
                                  _mm512_permutexvar_ps(nibbles, levels), sum[j % 2][run][half]);
            }
          }
        }
#pragma GCC unroll 2
        for (int run = 0; run < 2; run++) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            _mm512_storeu_ps(out + 32 * run + 16 * half, _mm512_add_ps(sum[0][run][half], sum[1][run][half]));
          }
        }
      }
    }
  }
};

template <>
struct FastDecode<Avx512, blocks::Q6_K> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    using F = Fast<Avx512, blocks::Q6_K>;
    const __m512i nibble = _mm512_set1_epi32(15), top = _mm512_set1_epi32(0x30);
    for (const float* end = out + k; out < end; out += 256, p += sizeof(blocks::Q6_K)) {
      alignas(64) float scales[16];
      _mm512_store_ps(scales, F::scales(p));
      for (int run = 0; run < 16; run++) {  // as blocks::Q6_K::decode
        const __m512i low = _mm512_cvtepu8_epi32(Avx512::load16(p + run / 8 * 64 + run % 4 * 16));
        const __m512i high = _mm512_cvtepu8_epi32(Avx512::load16(p + 128 + run / 8 * 32 + run % 2 * 16));
        const __m512i four =
            _mm512_and_si512(_mm512_srl_epi32(low, _mm_cvtsi32_si128(run % 8 / 4 * 4)), nibble);
        const __m512i two = _mm512_and_si512(
            _mm512_srl_epi32(_mm512_slli_epi32(high, 4), _mm_cvtsi32_si128(run % 8 / 2 * 2)), top);
        const __m512i code = _mm512_sub_epi32(_mm512_or_si512(four, two), _mm512_set1_epi32(32));
        _mm512_storeu_ps(out + 16 * run,
                         _mm512_mul_ps(_mm512_set1_ps(scales[run]), _mm512_cvtepi32_ps(code)));
      }
    }
  }
};

template <>
struct FastDecode<Avx512, F16Numbers> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) _mm512_storeu_ps(out + i, Avx512::load_half(p + 2 * i));
    for (; i < k; i++) out[i] = blocks::half_at(p + 2 * i);
  }
};
template <>
struct FastDecode<Avx512, Bf16Numbers> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * i));
      _mm512_storeu_ps(out + i, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
    }
    for (; i < k; i++) out[i] = blocks::as_float(static_cast<uint32_t>(blocks::load16(p + 2 * i)) << 16);
  }
};

}  // namespace
}  // namespace kvfold
