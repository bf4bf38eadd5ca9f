// The vocabulary of generic.h in 512-bit vectors.
//
// Compiled inside the target region that isa/avx512.cpp opens. VNNI multiplies unsigned by signed codes, so
// levels that need all of int8 become unsigned by adding 128.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/decode_blocks.h"

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
  // Sums of four products of a row dot in 256-bit vectors, of one pair of them or of two.
  static __m256i fours(__m256i w, __m256i x) { return _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x); }
  static __m256i fours(__m256i w, __m256i x, __m256i next_w, __m256i next_x) {
    return _mm256_dpbusd_epi32(fours(w, x), next_w, next_x);
  }
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
  // Attention over keys and values. 24 sums, two vectors of a panel, a word of a row: 27 of 32 registers, 14
  // loads for 24 dots.
  static constexpr int kPairVectors = 2, kPairRows = 12;
  static void to_shorts(const float* x, float factor, int16_t* out, int64_t n) {
    const Floats by = set(factor);
    for (int64_t i = 0; i < n; i += 16) {
      const auto mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, n - i)) - 1);
      const Ints whole = _mm512_cvtps_epi32(mul(_mm512_maskz_loadu_ps(mask, x + i), by));
      _mm512_mask_cvtsepi32_storeu_epi16(out + i, mask, whole);
    }
  }
  static Floats magnitude(Floats v) { return _mm512_abs_ps(v); }
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
    const Ints upper = _mm512_slli_epi32(_mm512_cvtps_epi32(high), 16);
    return _mm512_mask_mov_epi16(_mm512_cvtps_epi32(low), 0xaaaaaaaa, upper);
  }
  static Ints multiply_shares(Ints a, Ints b) { return _mm512_mulhrs_epi16(a, b); }
  // In a register, now: GCC 12 copies sums from one to another, and stores every copy.
  static Ints dot_shorts(Ints sum, Ints a, Ints b) {
    sum = _mm512_dpwssd_epi32(sum, a, b);
    __asm__("" : "+v"(sum));
    return sum;
  }
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

}  // namespace
}  // namespace kvfold
