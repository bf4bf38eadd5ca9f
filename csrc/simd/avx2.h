// The vocabulary of generic.h in 256-bit vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/decode_blocks.h"

namespace kvfold {
namespace {

inline float block_scale(const uint8_t* p) { return _cvtsh_ss(blocks::load16(p)); }
// float16 scales of 8, 4, 2 or 1 blocks, then zeros. Words that follow a first one in memory are replaced.
template <int64_t bytes, int count>
inline __m256 block_scales(const uint8_t* p) {
  if constexpr (count == 1) return _mm256_cvtph_ps(_mm_cvtsi32_si128(blocks::load16(p)));
  const auto some = [](const uint8_t* q) {
    __m128i words = _mm_cvtsi32_si128(static_cast<int>(blocks::load32(q)));
    words = _mm_insert_epi16(words, blocks::load16(q + bytes), 1);
    if constexpr (count > 2) {
      words = _mm_insert_epi16(words, blocks::load16(q + 2 * bytes), 2);
      words = _mm_insert_epi16(words, blocks::load16(q + 3 * bytes), 3);
    }
    return words;
  };
  __m128i words = some(p);
  if constexpr (count == 8) words = _mm_unpacklo_epi64(words, some(p + 4 * bytes));
  return _mm256_cvtph_ps(words);
}

struct Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kWideZero = 0;
  // 4 sums in int32 and 4 in float32, a vector of weights, four codes of x and what a dot needs: 14 of 16
  // registers.
  static constexpr int kTileVectors = 1, kTileCols = 4;
  // 8 sums, two vectors of weights, four codes of x, a product and ones: 13 registers. The sums in float32
  // wait in memory for the end of a block.
  static constexpr int kCodeVectors = 2, kCodeCols = 4;
  // 8 sums, magnitudes and signs of x, a product and ones: weights come from memory. 3 rows of x: the same
  // speed alone, less beside a busy neighbour.
  static constexpr int kSignVectors = 4, kSignCols = 2;
  static constexpr bool kPairSums = true, kNearPanels = true;

  using Floats = __m256;
  using Ints = __m256i;

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load_first(const float* p, int64_t n) {
    alignas(32) float lanes[kLanes] = {};
    std::memcpy(lanes, p, n * 4);
    return _mm256_load_ps(lanes);
  }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static void store_first(float* p, Floats v, int64_t n) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, v);
    std::memcpy(p, lanes, n * 4);
  }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(b, a); }  // of a NaN in a: NaN
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(b, a); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats round(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats power_of_2(Floats n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static float sum(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Ints set_ints(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_codes(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Ints four_codes(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  // Pairs are added in int16: 2 * 127 * 127, or with signed levels 2 * 128 * 127 = 32512, do not overflow.
  // Signed levels give their sign to x first.
  template <bool wide>
  static Ints dot(Ints sum, Ints w, Ints x) {
    const Ints pairs =
        wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
    return add_ints(sum, widened(pairs));
  }
  // Sums of two products in int16, before anything widens them. Not for `wide`.
  static Ints pairs(Ints w, Ints x) { return _mm256_maddubs_epi16(w, x); }
  static Ints add_words(Ints a, Ints b) { return held(_mm256_add_epi16(a, b)); }
  static Ints add_ints(Ints a, Ints b) { return held(_mm256_add_epi32(a, b)); }
  // In a register, now. GCC turns a chain of additions into a tree and spills its leaves (41 instead of 57
  // GMAC/s), and loads again for every use what there is no register for while others wait for the end of a
  // block.
  static Ints held(Ints v) {
    __asm__("" : "+x"(v));
    return v;
  }
  static Ints widened(Ints pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
  // Sums of four products of a row dot, of one pair of vectors or, of codes up to 31, of two.
  static Ints fours(Ints w, Ints x) { return widened(pairs(w, x)); }
  static Ints fours(Ints w, Ints x, Ints next_w, Ints next_x) {
    return widened(_mm256_add_epi16(pairs(w, x), pairs(next_w, next_x)));
  }
  static Ints exclusive_or(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
  // The vector at p, turned by signs. Loaded by itself it would take a register and an instruction more.
  static Ints xor_loaded(Ints signs, const uint8_t* p) {
    Ints turned;
    __asm__("vpxor %2, %1, %0" : "=x"(turned) : "x"(signs), "m"(*reinterpret_cast<const __m256i_u*>(p)));
    return turned;
  }
  static int32_t take_signs(const int8_t* codes, uint8_t* magnitudes, uint8_t* signs) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), zero = _mm_setzero_si128(),
                  below = _mm_cmpgt_epi8(zero, all), magnitude = _mm_abs_epi8(all);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(magnitudes), magnitude);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(signs), below);
    const __m128i sums = _mm_sad_epu8(_mm_and_si128(magnitude, below), zero);
    return -static_cast<int32_t>(_mm_cvtsi128_si64(sums) + _mm_extract_epi64(sums, 1));
  }
  template <int run>
  static Floats scales_of(const float* scales, int at) {
    if constexpr (run == 32) return _mm256_set1_ps(scales[at / 32]);
    return _mm256_insertf128_ps(_mm256_set1_ps(scales[at / 16]), _mm_set1_ps(scales[at / 16 + 1]), 1);
  }

  static void transpose(const uint8_t* p, int64_t stride, Ints* out) {
    const auto two = [&](int64_t i) {
      return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p + i * stride)),
                                     load16(p + (i + 4) * stride), 1);
    };
    const __m256i a = two(0), b = two(1), c = two(2), d = two(3);
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    out[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
    out[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
    out[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
    out[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
  }

  static float quantize(const float* x, int8_t* codes, int32_t* sums) {
    __m256 values[4];
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      values[i] = _mm256_loadu_ps(x + 8 * i);
      most = _mm256_max_epu32(
          most, _mm256_and_si256(_mm256_castps_si256(values[i]), _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    const auto bits = static_cast<uint32_t>(_mm_cvtsi128_si32(m));
    float largest;
    std::memcpy(&largest, &bits, 4);
    if (!(bits < 0x7f800000 && largest >= 0x1p-120f)) {
      std::memset(codes, 0, 32);
      sums[0] = sums[1] = 0;
      return bits < 0x7f800000 ? 0.0f : __builtin_nanf("");
    }
    const __m256 inverse = _mm256_set1_ps(127.0f / largest);
    __m256i whole[4];
    for (int i = 0; i < 4; i++) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
    for (int half = 0; half < 2; half++) {
      const __m256i a = whole[2 * half], b = whole[2 * half + 1], both = _mm256_add_epi32(a, b);
      __m128i s = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
      s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
      s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
      sums[half] = _mm_cvtsi128_si32(s);
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      const __m128i bytes =
          _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16 * half), bytes);
    }
    return largest / 127.0f;
  }

  static Floats dot_bf16(Floats sum, Ints w, Ints x) {
    return _mm256_fmadd_ps(high_half(w), high_half(x), _mm256_fmadd_ps(low_half(w), low_half(x), sum));
  }
  static void to_bf16(const float* x, uint16_t* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
      out[i] = static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  // Attention over keys and values. 12 sums, three words of rows and a product: 16 registers; vectors of a
  // panel are operands from memory. 6 rows by two vectors, softmax included: 67 instead of 69 GMAC/s.
  static constexpr int kPairVectors = 4, kPairRows = 3;
  static void to_shorts(const float* x, float factor, int16_t* out, int64_t n) {
    const Floats by = set(factor);
    const auto whole = [&](const float* p) { return _mm256_cvtps_epi32(mul(load(p), by)); };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const Ints both = _mm256_packs_epi32(whole(x + i), whole(x + i + 8));
      store_codes(out + i, _mm256_permute4x64_epi64(both, 0xd8));
    }
    for (; i < n; i++) out[i] = static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(x[i] * factor)));
  }
  static Floats magnitude(Floats v) { return _mm256_andnot_ps(set(-0.0f), v); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static float largest(Floats v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static Ints nearest_bf16(Floats v) {  // as the high half of a float32, the low half zero; NaN stays NaN
    const Ints bits = _mm256_castps_si256(v);
    const Ints odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Ints nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const Ints is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const Ints quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_and_si256(_mm256_blendv_epi8(nearest, quiet, is_nan), _mm256_set1_epi32(-65536));
  }
  static Ints bf16_pairs(Floats low, Floats high) {
    return _mm256_or_si256(_mm256_srli_epi32(nearest_bf16(low), 16), nearest_bf16(high));
  }
  static void store_bf16(uint16_t* p, Floats v) {
    const Ints low = _mm256_srli_epi32(nearest_bf16(v), 16);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
  static Floats load_half(const uint8_t* p) { return _mm256_cvtph_ps(load16(p)); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  // Every line of the next `bytes` of a row dot, so far ahead.
  static constexpr int64_t kAhead = 4096;
  template <int64_t bytes>
  static void prefetch_all(const uint8_t* p, int64_t ahead) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < bytes; line += 64) prefetch(p + ahead + line);
  }

  // Attention over latents.
  static constexpr int kLatentKeys = 4, kLatentCodeKeys = 4, kLatentColumns = 4;
  // Widened on their way from memory; GCC loads them first, and from a register that is half as fast (2.5
  // instead of 4.5 G/s on Zen 3).
  static Floats load_bytes(const int8_t* p) {
    using Eight = int8_t[kLanes];
    Ints words;
    __asm__("vpmovsxbd %1, %0" : "=x"(words) : "m"(*reinterpret_cast<const Eight*>(p)));
    return _mm256_cvtepi32_ps(words);
  }
  static Ints interleave(const uint16_t* low, const uint16_t* high) {
    const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    return _mm256_or_si256(a, _mm256_slli_epi32(b, 16));
  }
  static Ints whole_pairs(Floats low, Floats high) {
    return _mm256_blend_epi16(_mm256_cvtps_epi32(low), _mm256_slli_epi32(_mm256_cvtps_epi32(high), 16), 0xaa);
  }
  static Ints multiply_shares(Ints a, Ints b) { return _mm256_mulhrs_epi16(a, b); }
  static Ints dot_shorts(Ints sum, Ints a, Ints b) { return add_ints(sum, _mm256_madd_epi16(a, b)); }
  // Words are interleaved within halves of 128 bits, so columns 4 to 7 and 8 to 11 change places.
  static_assert(kLatentColumns == 4);
  static constexpr int pair_place(int column) { return column == 4 ? 8 : column == 8 ? 4 : column; }
  static void pair_bytes(const int8_t* low, const int8_t* high, uint32_t* to) {
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    store_codes(to, _mm256_unpacklo_epi16(a, b));
    store_codes(to + 8, _mm256_unpackhi_epi16(a, b));
  }
  static void q8_scales(const uint8_t* row, int64_t num_blocks, float* scales) {
    int64_t b = 0;
    for (; b + 8 <= num_blocks; b += 8, row += 8 * 34) store(scales + b, block_scales<34, 8>(row));
    for (; b < num_blocks; b++, row += 34) scales[b] = _cvtsh_ss(blocks::load16(row));
  }

  static Floats low_half(Ints v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static Floats high_half(Ints v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(-65536)));
  }
  static __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
};

}  // namespace
}  // namespace kvfold
