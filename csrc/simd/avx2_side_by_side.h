// Row dots and panels of rows side by side (kernels/side_by_side_dot.h) in 256-bit vectors: the 16 rows of a
// group are two vectors.
//
// Against rows one by one (simd/avx2.h) nothing is summed across a vector and eight scales are one load: 25
// instead of 15 GB/s for IQ4_NL in the second-level cache, 38 instead of 20 for Q4_0, 60 instead of 27 for
// Q8_0 (one thread of a Zen 3).
#pragma once

#include "kernels/side_by_side_dot.h"
#include "simd/avx2.h"

namespace kvfold {
namespace {

struct WideLanes {  // weights that need all of int8: w x = m (w ^ s) - m s, as wide_pairs() has it
  uint8_t magnitudes[32], signs[32];
  float scale;
  int32_t start;

  void set(const int8_t* codes, const int32_t*, float x_scale) {
    scale = x_scale;
    start = 0;
    for (int i = 0; i < 32; i += 16) start -= Avx2::take_signs(codes + i, magnitudes + i, signs + i);
  }
};

template <class T>
struct Avx2SideBySide {
  using Set = Avx2;
  using Type = T;
  using Mixed = SideBySide<T>;
  static constexpr bool kWide = Format<Avx2, T>::Like::kWide, kNibbles = sizeof(T::qs) == 16,
                        kFifth = sizeof(T) == 22;
  // Words of nibbles, or of codes, and how many of fifth bits there are before them.
  static constexpr int kWords = sizeof(T::qs) / 4, kFirst = Mixed::num_words - kWords;
  static constexpr int kPairs = Format<Avx2, T>::kPairs;  // that add up in int16
  using X = std::conditional_t<kWide, WideLanes, ZeroLanes<Format<Avx2, T>::kZero>>;

  // Two streams are read faster than one (docs/notes/cpu-kernels.md).
  static constexpr int kMostRows = 2, kStreams = 2;

  // Bytes read ahead. Two threads from memory, two streams each, GB/s with none, 0.75, 1.5 and 3 KiB, medians
  // (Zen 3): IQ4_NL 29.9, 31.7, 30.7, 32.0, Q4_0 18.6, 20.0, 19.5, 18.3 beside busy neighbours, Q5_0 26.7,
  // 27.4, 26.5, 27.1, Q8_0 19.0, 18.8, 16.3, 16.1 beside such.
  static constexpr int64_t kAhead = 768;

  static __m256i load(const Mixed& w, int word, int v) {
    return Avx2::load_codes(w.words[kFirst + word][8 * v]);
  }
  static __m256i low_codes(__m256i packed) {
    const __m256i nibbles = _mm256_and_si256(packed, _mm256_set1_epi8(15));
    if constexpr (kWide) return Codes32<T>::of(nibbles);
    return nibbles;
  }
  static __m256i high_codes(__m256i packed) { return low_codes(_mm256_srli_epi16(packed, 4)); }
  // The codes 4 quad to 4 quad + 3 of all.
  static __m256i with_fifths(const Mixed& w, int quad, int v, __m256i codes) {
    if constexpr (kFifth) return with_fifths_of(quad, codes, Avx2::load_codes(w.words[0][8 * v]));
    return codes;
  }

  // Four columns, `quad` of eight: sums of four products in int32, or of two in int16, of which kPairs fit.
  template <int rows, int vectors>
  static void add_quad(const X* const (&x)[rows], int quad, const __m256i (&w)[vectors],
                       __m256i (&sum)[rows][vectors]) {
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
      if constexpr (kWide) {
        const __m256i magnitude = Avx2::four_codes(x[r]->magnitudes + 4 * quad),
                      sign = Avx2::four_codes(x[r]->signs + 4 * quad);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_xor_si256(w[v], sign));
          sum[r][v] = Avx2::add_ints(sum[r][v], fours(pairs));
        }
      } else {
        const __m256i codes = Avx2::four_codes(x[r]->codes + 4 * quad);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          sum[r][v] = Avx2::add_words(sum[r][v], _mm256_maddubs_epi16(w[v], codes));
        }
      }
    }
  }

  // Adds sums of two in int16 to sums in int32, and begins anew.
  template <int rows, int vectors>
  static void widen(__m256i (&pairs)[rows][vectors], __m256i (&sum)[rows][vectors]) {
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        sum[r][v] = _mm256_add_epi32(sum[r][v], fours(pairs[r][v]));
        pairs[r][v] = _mm256_setzero_si256();
      }
    }
  }

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m256 (&out)[rows][2 * groups]) {
    constexpr int vectors = 2 * groups;
    __m256i sum[rows][vectors], pairs[rows][vectors];
    auto& products = kWide ? sum : pairs;
    // A word of a group is as long as a line: what is read ahead is asked for between the products.
    const auto prefetch = [ahead](const uint8_t* p) { Avx2::prefetch(p + ahead); };
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        sum[r][v] = _mm256_set1_epi32(x[r]->start);
        pairs[r][v] = _mm256_setzero_si256();
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++) prefetch(w[g]->scales[0]);
    if constexpr (kFifth) {
#pragma GCC unroll 2
      for (int g = 0; g < groups; g++) prefetch(w[g]->words[0][0]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kWords; q++) {
      __m256i packed[vectors], codes[vectors];
#pragma GCC unroll 2
      for (int g = 0; g < groups; g++) prefetch(w[g]->words[kFirst + q][0]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) packed[v] = load(*w[v / 2], q, v % 2);
      if constexpr (kNibbles) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) codes[v] = with_fifths(*w[v / 2], q, v % 2, low_codes(packed[v]));
        add_quad<rows, vectors>(x, q, codes, products);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
          codes[v] = with_fifths(*w[v / 2], 4 + q, v % 2, high_codes(packed[v]));
        add_quad<rows, vectors>(x, 4 + q, codes, products);
      } else {
        add_quad<rows, vectors>(x, q, packed, products);
      }
      if constexpr (!kWide) {
        if ((2 * q + 2) % kPairs == 0) widen<rows, vectors>(pairs, sum);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const __m256 d = scales(*w[v / 2], v % 2);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(x[r]->scale));
        out[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][v]), scale, out[r][v]);
      }
    }
  }

  static void quads(const Mixed& w, int v, __m256i (&codes)[8]) {
    for (int q = 0; q < kWords; q++) {
      const __m256i packed = load(w, q, v);
      if constexpr (kNibbles) {
        codes[q] = with_fifths(w, q, v, low_codes(packed));
        codes[4 + q] = with_fifths(w, 4 + q, v, high_codes(packed));
      } else {
        codes[q] = packed;
      }
    }
  }
  static __m256 scales(const Mixed& w, int v) { return Avx2::load_half(w.scales[8 * v]); }
};

}  // namespace
}  // namespace kvfold
