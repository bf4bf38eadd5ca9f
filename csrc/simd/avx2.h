// The vocabulary of generic.h in 256-bit vectors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/quant_formats.h"

namespace kvfold {
namespace {

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
  // Attention on bfloat16, a number a word: to take pairs apart is as much work as to multiply them. 12 sums,
  // two vectors of a panel, a word of a row: 15 of 16 registers, 8 loads for 12 products.
  static constexpr int kPairVectors = 2, kPairRows = 6;
  static constexpr int64_t kPairStep = 1;
  using Number = float;
  static constexpr int32_t kOnes = 0x3f800000;
  static void to_numbers(const float* x, Number* out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_numbers(out + i, load(x + i));
    if (i < n) store_first(out + i, _mm256_castsi256_ps(nearest_bf16(load_first(x + i, n - i))), n - i);
  }
  static void store_numbers(Number* p, Floats v) { store(p, _mm256_castsi256_ps(nearest_bf16(v))); }
  static Floats add_products(Floats sum, Ints w, Ints x) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(w), _mm256_castsi256_ps(x), sum);
  }
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
    return _mm256_or_si256(_mm256_cvtps_epi32(low), _mm256_slli_epi32(_mm256_cvtps_epi32(high), 16));
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

// Types of one float16 and 32 weights: codes() of a block.
template <class T>
struct Codes32;

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
  static __m256i of(__m256i nibbles) {
    const __m128i levels =
        _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles);
  }
  static __m256i codes(const uint8_t* p) { return of(nibbles(p + 2)); }
};
template <>
struct Codes32<blocks::Q8_0> {
  static __m256i codes(const uint8_t* p) { return Avx2::load_codes(p + 2); }
};

// Row dots are bound by the four vector ports of Zen 3 and by what waits in their schedulers: work goes in
// stages, each for all blocks of a group, so that little of what was issued waits for what was issued just
// before it. (A block at a time, the same instructions took a fifth longer.)

// Sums of a row that do not wait for each other: a multiply-add takes 4 cycles.
constexpr int dot_chains(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

template <int rows>
struct DotSums {
  static constexpr int kChains = dot_chains(rows);
  __m256 sum[rows][kChains], minus[rows];

  DotSums() {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      minus[r] = _mm256_setzero_ps();
      for (auto& s : sum[r]) s = _mm256_setzero_ps();
    }
  }
  void add(int r, int i, __m256i products, __m256 scale) {
    sum[r][i % kChains] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, sum[r][i % kChains]);
  }
  float total(int r) const {
    __m256 all = sum[r][0];
    for (int i = 1; i < kChains; i++) all = _mm256_add_ps(all, sum[r][i]);
    return Avx2::sum(all);
  }
};

inline __m256i fours(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Weights that need all of int8, times x as magnitudes m and signs s, 0 or -1: w x = m (w ^ s) - m s, of
// which the second part is known beforehand. An exclusive or may take any port, a sign has two.
inline __m256i wide_pairs(__m256i w, const DotRow& x, int64_t at) {
  return _mm256_maddubs_epi16(Avx2::load_codes(x.magnitudes + at),
                              _mm256_xor_si256(w, Avx2::load_codes(x.signs + at)));
}

// 32 nibbles under one float16, or two, the second the minimum, with fifth bits before them in Q5_0 and Q5_1.
// Two blocks a vector: a lane has 16 weights of one.
template <class T>
struct DotNibbles {
  static constexpr bool kHasMin = Parts<T>::kHasMin;
  static constexpr int64_t kBytes = sizeof(T), kNibbles = kBytes - 16,
                           kFifths = kHasMin ? 4 : 2;  // where they begin
  static constexpr bool kHasFifth = kNibbles > kFifths;
  static constexpr bool kWide = Format<Avx2, T>::Like::kWide;
  // Of 128 codes: the low nibbles of two blocks side by side, then the high ones.
  static constexpr int place(int piece) { return piece / 4 * 4 + piece % 2 * 2 + piece % 4 / 2; }

  static void quad_codes(const uint8_t* raw, int64_t row_bytes, __m256i (&out)[8]) {
    __m256i packed[4];
    Avx2::transpose(raw + kNibbles, row_bytes, packed);
    [[maybe_unused]] __m256i bits;
    if constexpr (kHasFifth) bits = words(raw + kFifths, row_bytes);
    for (int j = 0; j < 4; j++) {
      out[j] = _mm256_and_si256(packed[j], _mm256_set1_epi8(15));
      out[4 + j] = _mm256_and_si256(_mm256_srli_epi16(packed[j], 4), _mm256_set1_epi8(15));
      if constexpr (kWide) out[j] = Codes32<T>::of(out[j]), out[4 + j] = Codes32<T>::of(out[4 + j]);
      if constexpr (kHasFifth) {
        out[j] = with_fifths_of(j, out[j], bits);
        out[4 + j] = with_fifths_of(4 + j, out[4 + j], bits);
      }
    }
  }

  static __m256i words(const uint8_t* p, int64_t row_bytes) {  // of four bytes, one of each row
    const auto at = [&](int64_t i) { return static_cast<int>(blocks::load32(p + i * row_bytes)); };
    return _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  }

  // Products of both vectors of two blocks with 64 codes of x: sums of four in int32.
  static __m256i products(__m256i low, __m256i high, const DotRow& x, int64_t at) {
    if constexpr (kWide) {
      return _mm256_add_epi32(fours(wide_pairs(low, x, at)), fours(wide_pairs(high, x, at + 32)));
    } else {  // 4 * 31 * 127 fits int16
      return fours(_mm256_add_epi16(_mm256_maddubs_epi16(low, Avx2::load_codes(x.codes + at)),
                                    _mm256_maddubs_epi16(high, Avx2::load_codes(x.codes + at + 32))));
    }
  }

  // 16 bytes from there, and from the same place in the next block.
  static __m256i two_blocks(const uint8_t* p) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(Avx2::load16(p)), Avx2::load16(p + kBytes), 1);
  }

  template <int rows, int blocks>
  static void group(const uint8_t* p, const DotRow* x, int64_t block, DotSums<rows>& sums) {
    constexpr int kPairs = blocks / 2;
    const __m256 d = block_scales<kBytes, blocks>(p);
    const __m256 zero = kHasMin ? block_scales<kBytes, blocks>(p + 2) : d;
    __m256 scale[rows];  // a lane: of one block of each pair
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      scale[r] = _mm256_permutevar8x32_ps(_mm256_mul_ps(d, _mm256_loadu_ps(x[r].scales + block)),
                                          _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
      sums.minus[r] = _mm256_fmadd_ps(zero, _mm256_loadu_ps(x[r].sums + block), sums.minus[r]);
    }
    __m256i low[kPairs], high[kPairs];
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; i++) low[i] = two_blocks(p + 2 * i * kBytes + kNibbles);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; i++) high[i] = _mm256_and_si256(_mm256_srli_epi16(low[i], 4), nibble);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; i++) low[i] = _mm256_and_si256(low[i], nibble);
    if constexpr (kWide) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i++) low[i] = Codes32<T>::of(low[i]), high[i] = Codes32<T>::of(high[i]);
    }
    if constexpr (kHasFifth) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i++) {
        const __m256i bits = two_blocks(p + 2 * i * kBytes + kFifths);
        low[i] = with_fifths<0, 0>(low[i], bits);
        high[i] = with_fifths<2, 2>(high[i], bits);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      __m256i sum[kPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i++) sum[i] = products(low[i], high[i], x[r], 32 * (block + 2 * i));
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i++) {
        const __m256 d_x = i == 0   ? _mm256_permute_ps(scale[r], 0x00)
                           : i == 1 ? _mm256_permute_ps(scale[r], 0x55)
                           : i == 2 ? _mm256_permute_ps(scale[r], 0xaa)
                                    : _mm256_permute_ps(scale[r], 0xff);
        sums.add(r, i, sum[i], d_x);
      }
    }
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    DotSums<rows> sums;
    const int64_t num_blocks = k / 32;
    int64_t block = 0;
    for (; block + 8 <= num_blocks; block += 8, row += 8 * kBytes) {
      Avx2::prefetch_all<8 * kBytes>(row, ahead);
      group<rows, 8>(row, x, block, sums);
    }
    if (block < num_blocks) Avx2::prefetch_all<8 * kBytes>(row, ahead);
    if (block + 4 <= num_blocks) {
      group<rows, 4>(row, x, block, sums);
      block += 4, row += 4 * kBytes;
    }
    if (block < num_blocks) {  // up to three; x has zeros after them
      uint8_t last[4 * kBytes] = {};
      std::memcpy(last, row, (num_blocks - block) * kBytes);
      group<rows, 4>(last, x, block, sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const float zero = kHasMin ? -1.0f : kWide ? 1.0f : static_cast<float>(Format<Avx2, T>::kZero);
      y[r] = sums.total(r) - zero * Avx2::sum(sums.minus[r]);
    }
  }
};

// 32 signed bytes under one float16: 34 bytes a block.
struct Dot34 {
  static constexpr int64_t kBytes = 34;
  static constexpr int place(int piece) { return piece; }

  static void quad_codes(const uint8_t* raw, int64_t row_bytes, __m256i (&out)[8]) {
    Avx2::transpose(raw + 2, row_bytes, out);
    Avx2::transpose(raw + 18, row_bytes, out + 4);
  }

  template <int rows, int blocks>
  static void group(const uint8_t* p, const DotRow* x, int64_t block, DotSums<rows>& sums) {
    const __m256 d = block_scales<kBytes, blocks>(p);
    alignas(32) float scale[rows][8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      _mm256_store_ps(scale[r], _mm256_mul_ps(d, _mm256_loadu_ps(x[r].scales + block)));
      sums.minus[r] = _mm256_fmadd_ps(d, _mm256_loadu_ps(x[r].sums + block), sums.minus[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      __m256i sum[blocks];
#pragma GCC unroll 8
      for (int i = 0; i < blocks; i++)
        sum[i] = fours(wide_pairs(Avx2::load_codes(p + i * kBytes + 2), x[r], 32 * (block + i)));
#pragma GCC unroll 8
      for (int i = 0; i < blocks; i++) sums.add(r, i, sum[i], _mm256_broadcast_ss(scale[r] + i));
    }
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    DotSums<rows> sums;
    const int64_t num_blocks = k / 32;
    int64_t block = 0;
    for (; block + 8 <= num_blocks; block += 8, row += 8 * kBytes) {
      Avx2::prefetch_all<8 * kBytes>(row, ahead);
      group<rows, 8>(row, x, block, sums);
    }
    if (block < num_blocks) Avx2::prefetch_all<8 * kBytes>(row, ahead);
    for (; block + 2 <= num_blocks; block += 2, row += 2 * kBytes) group<rows, 2>(row, x, block, sums);
    if (block < num_blocks) group<rows, 1>(row, x, block, sums);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = sums.total(r) - Avx2::sum(sums.minus[r]);
  }
};

template <class T, class Dot>
struct Fast32 : Dot {
  static constexpr bool kDot = true, kUnpack = false, kQuads = !Parts<T>::kHasMin, kTakeApart = true;

  static __m256 quads(const uint8_t* raw, int64_t row_bytes, __m256i (&out)[8]) {
    Dot::quad_codes(raw, row_bytes, out);
    const auto at = [&](int64_t i) { return static_cast<int16_t>(blocks::load16(raw + i * row_bytes)); };
    return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
  }

  static float scale(const uint8_t* p) { return _cvtsh_ss(blocks::load16(p)); }
  static void take_apart(const uint8_t* block, int, uint8_t* codes, float* scales, float* minimums) {
    Avx2::store_codes(codes, Codes32<T>::codes(block));
    scales[0] = scale(block);
    if constexpr (Parts<T>::kHasMin) minimums[0] = -scale(block + 2);
  }
};
template <>
struct Fast<Avx2, blocks::Q4_0> : Fast32<blocks::Q4_0, DotNibbles<blocks::Q4_0>> {};
template <>
struct Fast<Avx2, blocks::Q4_1> : Fast32<blocks::Q4_1, DotNibbles<blocks::Q4_1>> {};
template <>
struct Fast<Avx2, blocks::Q5_1> : Fast32<blocks::Q5_1, DotNibbles<blocks::Q5_1>> {};
template <>
struct Fast<Avx2, blocks::Q5_0> : Fast32<blocks::Q5_0, DotNibbles<blocks::Q5_0>> {};
template <>
struct Fast<Avx2, blocks::IQ4_NL> : Fast32<blocks::IQ4_NL, DotNibbles<blocks::IQ4_NL>> {};
template <>
struct Fast<Avx2, blocks::Q8_0> : Fast32<blocks::Q8_0, Dot34> {};

// Types of 256 weights: eight vectors of codes.
template <class T>
struct Codes256;

template <>
struct Codes256<blocks::Q4_K> {
  static void codes(const uint8_t* p, __m256i* out) {
    for (int pair = 0; pair < 4; pair++) {
      const __m256i packed = Avx2::load_codes(p + 16 + 32 * pair);
      out[2 * pair] = _mm256_and_si256(packed, _mm256_set1_epi8(15));
      out[2 * pair + 1] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
    }
  }

  // Eight bytes of scales or minimums times the float16 at `half`.
  static __m256 times_half(uint64_t bytes, const uint8_t* half) {
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(_cvtsh_ss(blocks::load16(half))));
  }
  // Eight of six bits each out of twelve bytes (decode_blocks.h, k_scale), four to a word.
  static void scales(const uint8_t* p, __m256& scale, __m256& minimum) {
    const uint32_t first = blocks::load32(p + 4), second = blocks::load32(p + 8),
                   third = blocks::load32(p + 12);
    const uint64_t last_scales = (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030),
                   last_minimums = (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030);
    scale = times_half((first & 0x3f3f3f3f) | last_scales << 32, p);
    minimum = times_half((second & 0x3f3f3f3f) | last_minimums << 32, p + 2);
  }

  static void take_scales(const uint8_t* p, float* scale, float* minimum) {
    __m256 d, m;
    scales(p, d, m);
    _mm256_storeu_ps(scale, d);
    _mm256_storeu_ps(minimum, m);
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    DotSums<rows> sums;
    for (int64_t at = 0; at < k; at += 256, row += sizeof(blocks::Q4_K)) {
      Avx2::prefetch_all<sizeof(blocks::Q4_K)>(row, ahead);
      __m256 d, minimum;
      scales(row, d, minimum);
      alignas(32) float scale[rows][8];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        _mm256_store_ps(scale[r], _mm256_mul_ps(d, _mm256_loadu_ps(x[r].scales + at / 32)));
        sums.minus[r] = _mm256_fmadd_ps(minimum, _mm256_loadu_ps(x[r].sums + at / 32), sums.minus[r]);
      }
      __m256i vectors[8];
      codes(row, vectors);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        __m256i sum[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
          sum[i] = fours(_mm256_maddubs_epi16(vectors[i], Avx2::load_codes(x[r].codes + at + 32 * i)));
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums.add(r, i, sum[i], _mm256_broadcast_ss(scale[r] + i));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = sums.total(r) - Avx2::sum(sums.minus[r]);
  }
};

template <>
struct Codes256<blocks::Q6_K> {
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
  static void codes(const uint8_t* p, __m256i* out) {
    for (int half = 0; half < 2; half++) {
      __m256i of_half[4];
      half_codes(p, half, of_half);
      std::copy(of_half, of_half + 4, out + 4 * half);
    }
  }

  static void take_scales(const uint8_t* p, float* scale, float*) {
    const __m256 d = _mm256_set1_ps(_cvtsh_ss(blocks::load16(p + 208)));
    for (int i = 0; i < 16; i += 8)
      _mm256_storeu_ps(scale + i,
                       _mm256_mul_ps(Avx2::load_bytes(reinterpret_cast<const int8_t*>(p + 192 + i)), d));
  }

  // A block of activations meets two runs, a lane each. Their scales are whole numbers, so the product that
  // widens the sums of a lane multiplies by them: 4 * 63 * 127 * 128 is far from 2^31.
  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    __m256 sum[rows], minus[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm256_setzero_ps();
    for (int64_t at = 0; at < k; at += 256, row += sizeof(blocks::Q6_K)) {
      Avx2::prefetch_all<sizeof(blocks::Q6_K)>(row, ahead);
      const uint8_t* runs = row + 192;
      const __m256 d = _mm256_set1_ps(_cvtsh_ss(blocks::load16(row + 208)));
      // Scales of even runs in the lower lane, of odd ones in the upper, as words.
      const __m256i bytes = _mm256_broadcastsi128_si256(Avx2::load16(runs));
      const __m256i words =
          _mm256_srai_epi16(_mm256_blend_epi32(_mm256_slli_epi16(bytes, 8), bytes, 0xf0), 8);
      const __m256 first = Avx2::load_bytes(reinterpret_cast<const int8_t*>(runs)),
                   second = Avx2::load_bytes(reinterpret_cast<const int8_t*>(runs + 8));
      __m256 part[rows][2];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        const float* x_sums = x[r].sums + at / 16;
        const __m256 zeros = _mm256_fmadd_ps(second, _mm256_loadu_ps(x_sums + 8),
                                             _mm256_mul_ps(first, _mm256_loadu_ps(x_sums)));
        minus[r] = _mm256_fmadd_ps(d, zeros, minus[r]);
        part[r][0] = part[r][1] = _mm256_setzero_ps();
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m256i vectors[4];
        half_codes(row, half, vectors);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const int run = 2 * (4 * half + i);  // and the next one
          const __m256i scale =
              _mm256_shuffle_epi8(words, _mm256_set1_epi16(static_cast<int16_t>((run + 1) << 8 | run)));
#pragma GCC unroll 4
          for (int r = 0; r < rows; r++) {
            const __m256i pairs =
                _mm256_maddubs_epi16(vectors[i], Avx2::load_codes(x[r].codes + at + 16 * run));
            part[r][i % 2] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, scale)),
                                _mm256_broadcast_ss(x[r].scales + at / 16 + run), part[r][i % 2]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        sum[r] = _mm256_fmadd_ps(d, _mm256_add_ps(part[r][0], part[r][1]), sum[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = Avx2::sum(_mm256_fnmadd_ps(_mm256_set1_ps(32), minus[r], sum[r]));
  }
};

template <class T>
struct Fast256 {
  static constexpr bool kDot = true, kUnpack = false, kQuads = false, kTakeApart = true;
  static constexpr int place(int piece) { return piece; }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    Codes256<T>::template dot<rows>(row, k, x, y, ahead);
  }

  static void take_apart(const uint8_t* block, int, uint8_t* codes, float* scales, float* minimums) {
    Codes256<T>::take_scales(block, scales, minimums);
    __m256i vectors[8];
    Codes256<T>::codes(block, vectors);
    for (int i = 0; i < 8; i++) Avx2::store_codes(codes + 32 * i, vectors[i]);
  }
};
template <>
struct Fast<Avx2, blocks::Q4_K> : Fast256<blocks::Q4_K> {};
template <>
struct Fast<Avx2, blocks::Q6_K> : Fast256<blocks::Q6_K> {};

template <class T>
struct Decode32 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    for (const float* end = out + k; out < end; out += 32, p += sizeof(T)) {
      alignas(32) int8_t codes[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes), Codes32<T>::codes(p));
      const __m256 scale = _mm256_set1_ps(Fast<Avx2, T>::scale(p)),
                   zero = _mm256_set1_ps(Parts<T>::kWide ? 0 : 8);
      for (int i = 0; i < 32; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_mul_ps(scale, _mm256_sub_ps(Avx2::load_bytes(codes + i), zero)));
      }
    }
  }
};
template <>
struct FastDecode<Avx2, blocks::Q4_0> : Decode32<blocks::Q4_0> {};
template <>
struct FastDecode<Avx2, blocks::IQ4_NL> : Decode32<blocks::IQ4_NL> {};
template <>
struct FastDecode<Avx2, blocks::Q8_0> : Decode32<blocks::Q8_0> {};

template <>
struct FastDecode<Avx2, blocks::Q4_K> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    using Of = Codes256<blocks::Q4_K>;
    for (const float* end = out + k; out < end; p += sizeof(blocks::Q4_K)) {
      alignas(32) float scales[8], minimums[8];
      alignas(32) int8_t codes[8][32];
      Of::take_scales(p, scales, minimums);
      __m256i vectors[8];
      Of::codes(p, vectors);
      for (int run = 0; run < 8; run++) Avx2::store_codes(codes[run], vectors[run]);
      for (int run = 0; run < 8; run++) {
        const __m256 scale = _mm256_set1_ps(scales[run]), minimum = _mm256_set1_ps(minimums[run]);
        for (int i = 0; i < 32; i += 8, out += 8) {  // scale * code is exact
          Avx2::store(out, _mm256_fmsub_ps(scale, Avx2::load_bytes(codes[run] + i), minimum));
        }
      }
    }
  }
};

// Levels of a block as signed bytes.
template <class T>
inline __m256i levels32(const uint8_t* block) {
  const __m256i codes = Codes32<T>::codes(block);
  if constexpr (Parts<T>::kWide) {
    return codes;
  } else {
    return _mm256_sub_epi8(codes, _mm256_set1_epi8(Parts<T>::kZero));
  }
}

template <class T>
struct Fold32 {
  static constexpr int64_t kBytes = sizeof(T), kRows = 16;

  // 32 columns at a time, in stages: bytes of all rows, then their products.
  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    constexpr int64_t kLines = (kRows * kBytes + 63) / 64;  // of 16 blocks
    for (const float* end = out + k; out < end; out += 32, rows += kBytes) {
      for (int64_t line = 0; line < kLines; line++, next += 64) Avx2::prefetch(next);
      alignas(32) uint16_t halves[kRows];
      alignas(32) int8_t levels[kRows][32];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kRows; j++) {
        halves[j] = blocks::load16(rows + j * row_bytes);
        Avx2::store_codes(levels[j], levels32<T>(rows + j * row_bytes));
      }
      alignas(32) float scaled[kRows];
      for (int64_t j = 0; j < kRows; j += 8) {
        const __m256 scales = Avx2::load_half(reinterpret_cast<const uint8_t*>(halves + j));
        Avx2::store(scaled + j, _mm256_mul_ps(scales, Avx2::load(x + j)));
      }
      __m256 sum[2][4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[0][v] = Avx2::load(out + 8 * v), sum[1][v] = Avx2::zero();
#pragma GCC unroll 16
      for (int64_t j = 0; j < kRows; j++) {
        const __m256 factor = _mm256_broadcast_ss(scaled + j);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
          sum[j % 2][v] = _mm256_fmadd_ps(factor, Avx2::load_bytes(levels[j] + 8 * v), sum[j % 2][v]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) Avx2::store(out + 8 * v, _mm256_add_ps(sum[0][v], sum[1][v]));
    }
  }
};
template <>
struct FastFold<Avx2, blocks::Q4_K> {
  using Of = Codes256<blocks::Q4_K>;
  static constexpr int64_t kBytes = sizeof(blocks::Q4_K), kRows = 16;

  // The minimums of a run, times x, are one number for its 32 columns.
  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    constexpr int64_t kQuarter = kRows * kBytes / 4;  // of 16 blocks: nine lines, for two runs
    for (const float* end = out + k; out < end; rows += kBytes) {
      alignas(32) float scaled[kRows][8], least[8];
      alignas(32) int8_t codes[8][kRows][32];
      __m256 sum_of_least = Avx2::zero();
      for (int64_t j = 0; j < kRows; j++) {
        const __m256 factor = _mm256_set1_ps(x[j]);
        __m256 scale, minimum;
        Of::scales(rows + j * row_bytes, scale, minimum);
        Avx2::store(scaled[j], _mm256_mul_ps(scale, factor));
        sum_of_least = _mm256_fmadd_ps(minimum, factor, sum_of_least);
        __m256i vectors[8];
        Of::codes(rows + j * row_bytes, vectors);
        for (int run = 0; run < 8; run++) Avx2::store_codes(codes[run][j], vectors[run]);
      }
      Avx2::store(least, sum_of_least);
      for (int run = 0; run < 8; run++, out += 32) {
        if (run % 2 == 0) {
          Avx2::prefetch_all<kQuarter>(next, 0);
          next += kQuarter;
        }
        __m256 sum[2][4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          sum[0][v] = _mm256_sub_ps(Avx2::load(out + 8 * v), _mm256_set1_ps(least[run]));
          sum[1][v] = Avx2::zero();
        }
#pragma GCC unroll 16
        for (int64_t j = 0; j < kRows; j++) {
          const __m256 factor = _mm256_broadcast_ss(scaled[j] + run);
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++)
            sum[j % 2][v] = _mm256_fmadd_ps(factor, Avx2::load_bytes(codes[run][j] + 8 * v), sum[j % 2][v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) Avx2::store(out + 8 * v, _mm256_add_ps(sum[0][v], sum[1][v]));
      }
    }
  }
};
template <>
struct FastFold<Avx2, blocks::Q4_0> : Fold32<blocks::Q4_0> {};
template <>
struct FastFold<Avx2, blocks::IQ4_NL> : Fold32<blocks::IQ4_NL> {};
template <>
struct FastFold<Avx2, blocks::Q8_0> : Fold32<blocks::Q8_0> {};

}  // namespace
}  // namespace kvfold
