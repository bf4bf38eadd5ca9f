// Row dots and panels of rows side by side (kernels/side_by_side_dot.h) in 256-bit vectors: the 16 rows of a
// group are two vectors.
//
// Against rows one by one (simd/avx2_dots.h) nothing is summed across a vector and eight scales are one load:
// 25 instead of 15 GB/s for IQ4_NL in the second-level cache, 38 instead of 20 for Q4_0, 60 instead of 27 for
// Q8_0 (one thread of a Zen 3).
#pragma once

#include <algorithm>

#include "kernels/side_by_side_dot.h"
#include "simd/avx2_codes.h"

namespace kvfold {
namespace {

struct WideLanes {  // weights that need all of int8: w x = m (w ^ s) - m s, as wide_pairs() has it
  uint8_t magnitudes[32], signs[32];
  float scale;
  int32_t starts[1];

  void set(const int8_t* codes, const int32_t*, float x_scale) {
    scale = x_scale;
    starts[0] = 0;
    for (int i = 0; i < 32; i += 16) starts[0] -= Avx2::take_signs(codes + i, magnitudes + i, signs + i);
  }
};

inline __m256i low_nibbles(__m256i packed) { return _mm256_and_si256(packed, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i packed) { return low_nibbles(_mm256_srli_epi16(packed, 4)); }
// A byte of each of eight rows, in all of a lane, or in both its words.
inline __m256i bytes_of_rows(const void* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
inline __m256i words_of_rows(const void* p) {
  const auto lane = [](uint32_t row) {  // 0xff: a zero
    return static_cast<int>(0xff00ff00 + row * 0x00010001);
  };
  int64_t rows;
  std::memcpy(&rows, p, 8);
  return _mm256_shuffle_epi8(_mm256_set1_epi64x(rows), _mm256_setr_epi32(lane(0), lane(1), lane(2), lane(3),
                                                                         lane(4), lane(5), lane(6), lane(7)));
}

template <class T>
struct Avx2SideBySide {
  using Set = Avx2;
  using Type = T;
  using Mixed = SideBySide<T>;
  static constexpr bool kWide = Format<Avx2, T>::Like::kWide, kNibbles = sizeof(T::qs) == 16,
                        kFifth = sizeof(T) == 22;
  // Words of nibbles, or of codes, and how many of fifth bits there are before them.
  static constexpr int kWords = sizeof(T::qs) / 4, kFirst = Mixed::num_words - kWords;
  static_assert(kWide || Format<Avx2, T>::kPairs == 8);  // all of a block add up in int16
  using X = std::conditional_t<kWide, WideLanes, ZeroLanes<Format<Avx2, T>::kZero, 1, true>>;

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
    const __m256i nibbles = low_nibbles(packed);
    if constexpr (kWide) return Codes32<T>::of(nibbles);
    return nibbles;
  }
  static __m256i high_codes(__m256i packed) { return low_codes(_mm256_srli_epi16(packed, 4)); }
  // The codes 4 quad to 4 quad + 3 of all.
  static __m256i with_fifths(const Mixed& w, int quad, int v, __m256i codes) {
    if constexpr (kFifth) return with_fifths_of(quad, codes, Avx2::load_codes(w.words[0][8 * v]));
    return codes;
  }

  // Four columns, `quad` of eight: sums of four products in int32, or of two in int16.
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
          sum[r][v] = Avx2::add_ints(sum[r][v], Avx2::widened(pairs));
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

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m256 (&out)[rows][2 * groups]) {
    constexpr int vectors = 2 * groups;
    __m256i sum[rows][vectors];
    // A word of a group is as long as a line: what is read ahead is asked for between the products.
    const auto prefetch = [ahead](const uint8_t* p) { Avx2::prefetch(p + ahead); };
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        sum[r][v] = _mm256_set1_epi32(x[r]->starts[0]);
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
        add_quad<rows, vectors>(x, q, codes, sum);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
          codes[v] = with_fifths(*w[v / 2], 4 + q, v % 2, high_codes(packed[v]));
        add_quad<rows, vectors>(x, 4 + q, codes, sum);
      } else {
        add_quad<rows, vectors>(x, q, packed, sum);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const __m256 d = scales(*w[v / 2], v % 2);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(x[r]->scale));
        const __m256i whole = kWide ? sum[r][v] : Avx2::widened(sum[r][v]);
        out[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, out[r][v]);
      }
    }
  }

  static void quads(const Mixed& w, int, int v, __m256i (&codes)[8]) {
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
  static void scales(const Mixed& w, int, int v, __m256 (&of_block)[1]) { of_block[0] = scales(w, v); }
};

// Codes of runs, each with a scale and a minimum of its own: a run's sums of two products fit int16, the
// product that widens them multiplies by the scale, and the float16 fields meet the sums of all runs.
template <>
struct Avx2SideBySide<blocks::Q4_K> {
  using Set = Avx2;
  using Type = blocks::Q4_K;
  using Mixed = SideBySide<Type>;
  using X = MinLanes;
  static_assert(Format<Avx2, Type>::kPairs == 8);

  // Two threads from memory, row by row 17.5 GB/s: one stream 20.4, two 24.9, 22 without reading ahead, 23.2
  // and 23.6 with 1.5 and 2.25 KiB (Zen 3 beside busy neighbours; IQ4_NL 23.5, reading 29.0).
  static constexpr int kMostRows = 2, kStreams = 2;
  static constexpr int64_t kAhead = 768;

  static constexpr int kRuns = Type::elements / 32, kWords = 4;
  static constexpr int64_t kFirstCodes = offsetof(Mixed, words);

  // Scales and minimums of all runs of a group, a byte each.
  struct OfRuns {
    alignas(32) uint8_t scales[kRuns][kRowsSideBySide], minimums[kRuns][kRowsSideBySide];

    void set(const Mixed& w) {
      const __m256i top = _mm256_set1_epi8(0x30);
#pragma GCC unroll 4
      for (int run = 0; run < kRuns; run += 2) {
        const __m256i lower = Avx2::load_codes(w.lower[run]), upper = Avx2::load_codes(w.upper[run % 4]);
        const __m256i of_scale = run < 4 ? _mm256_slli_epi16(upper, 4) : upper,
                      of_minimum = run < 4 ? _mm256_slli_epi16(upper, 2) : _mm256_srli_epi16(upper, 2);
        Avx2::store_codes(scales[run], _mm256_or_si256(low_nibbles(lower), _mm256_and_si256(of_scale, top)));
        Avx2::store_codes(minimums[run],
                          _mm256_or_si256(high_nibbles(lower), _mm256_and_si256(of_minimum, top)));
      }
    }
    __m256 minimum(int run, int v) const { return _mm256_cvtepi32_ps(bytes_of_rows(minimums[run] + 8 * v)); }
  };

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m256 (&out)[rows][2 * groups]) {
    constexpr int vectors = 2 * groups;
    const auto prefetch = [ahead](const void* p) { Avx2::prefetch(static_cast<const uint8_t*>(p) + ahead); };
    OfRuns of_runs[groups];
    __m256 sum[rows][vectors], least[rows][vectors];
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++) {
      prefetch_first<kFirstCodes>(w[g], prefetch);
      of_runs[g].set(*w[g]);
    }
    clear<Avx2>(sum), clear<Avx2>(least);
#pragma GCC unroll 1
    for (int run = 0; run < kRuns; run++) {
      __m256i pairs[rows][vectors];
#pragma GCC unroll 4
      for (int q = 0; q < kWords; q++) {
        __m256i packed[vectors];
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++) prefetch(w[g]->words[run][q]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          __m256i of_x[rows];
#pragma GCC unroll 2
          for (int r = 0; r < rows; r++) of_x[r] = Avx2::four_codes(x[r][run].codes + 16 * half + 4 * q);
          // A vector after the other: registers are few.
#pragma GCC unroll 4
          for (int v = 0; v < vectors; v++) {
            if (half == 0) packed[v] = Avx2::load_codes(w[v / 2]->words[run][q][8 * (v % 2)]);
            const __m256i codes = half == 0 ? low_nibbles(packed[v]) : high_nibbles(packed[v]);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
              const __m256i two = _mm256_maddubs_epi16(codes, of_x[r]);
              pairs[r][v] = q + half == 0 ? Avx2::held(two) : Avx2::add_words(pairs[r][v], two);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        const __m256i scale = words_of_rows(of_runs[v / 2].scales[run] + 8 * (v % 2));
        const __m256 minimum = of_runs[v / 2].minimum(run, v % 2);
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
          const __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs[r][v], scale));
          sum[r][v] = _mm256_fmadd_ps(products, _mm256_set1_ps(x[r][run].scale), sum[r][v]);
          least[r][v] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x[r][run].sum), least[r][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const __m256 d = Avx2::load_half(w[v / 2]->d[8 * (v % 2)]),
                   dmin = Avx2::load_half(w[v / 2]->dmin[8 * (v % 2)]);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) {
        out[r][v] = _mm256_fnmadd_ps(dmin, least[r][v], _mm256_fmadd_ps(d, sum[r][v], out[r][v]));
      }
    }
  }

  static void quads(const Mixed& w, int run, int v, __m256i (&codes)[8]) {
    for (int q = 0; q < kWords; q++) {
      const __m256i packed = Avx2::load_codes(w.words[run][q][8 * v]);
      codes[q] = low_nibbles(packed);
      codes[kWords + q] = high_nibbles(packed);
    }
  }
  static void scales(const Mixed& w, int run, int v, __m256 (&of_run)[2]) {
    const __m256i lower = bytes_of_rows(w.lower[run] + 8 * v),
                  upper = _mm256_srli_epi32(bytes_of_rows(w.upper[run % 4] + 8 * v), run / 4 * 4);
    const __m256i scale = _mm256_or_si256(
        low_nibbles(lower), _mm256_slli_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(3)), 4));
    const __m256i minimum = _mm256_or_si256(
        _mm256_srli_epi32(lower, 4), _mm256_slli_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(12)), 2));
    const __m256 d = Avx2::load_half(w.d[8 * v]), dmin = Avx2::load_half(w.dmin[8 * v]);
    of_run[0] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(scale));
    of_run[1] = _mm256_mul_ps(_mm256_cvtepi32_ps(minimum), _mm256_xor_ps(dmin, _mm256_set1_ps(-0.0f)));
  }
};

// A run's sums of eight products of levels fit int16 (8 * 32 * 127), whatever codes add up to on the way.
template <>
struct Avx2SideBySide<blocks::Q6_K> {
  using Set = Avx2;
  using Type = blocks::Q6_K;
  using Mixed = SideBySide<Type>;
  using X = ZeroLanes<32, 2, true>;
  static_assert(Format<Avx2, Type>::kZero == 32);

  // Two threads from memory, GB/s, medians of two runs (Zen 3 beside busy neighbours; reading 22.6 and 19.2):
  // one stream 18.9 and 16.6, two 20.2 and 16.9, 19.8 and 16.2 without reading ahead, 18.9 and 15.8 with 1.5
  // KiB.
  static constexpr int kMostRows = 2, kStreams = 2;
  static constexpr int64_t kAhead = 768;

  static constexpr int kParts = Type::elements / 32;
  static constexpr int64_t kFirstCodes = offsetof(Mixed, words);

  // The codes of a run, four columns each.
  static void run_codes(const Mixed& w, int run, int v, __m256i (&codes)[4]) {
    const __m256i six = _mm256_set1_epi8(63);
    __m256i words[3];
#pragma GCC unroll 3
    for (int q = 0; q < 3; q++) {
      words[q] = Avx2::load_codes(w.words[run][q][8 * v]);
      codes[q] = _mm256_and_si256(words[q], six);
    }
    const __m256i fourth =
        _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi32(words[0], 2), _mm256_srli_epi32(words[1], 4)),
                         _mm256_srli_epi32(words[2], 6));
    codes[3] = _mm256_and_si256(fourth, six);
  }

  // The scales of a run, each in both words of a lane.
  static void run_scales(const Mixed& w, int run, __m256i (&of_rows)[2]) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales[run]));
    // Rows 0 to 3 and 8 to 11 first: unpacking takes the lower half of either lane.
    const __m256i words = _mm256_cvtepi8_epi16(_mm_shuffle_epi32(bytes, 0xd8));
    of_rows[0] = _mm256_unpacklo_epi16(words, words);
    of_rows[1] = _mm256_unpackhi_epi16(words, words);
  }

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m256 (&out)[rows][2 * groups]) {
    constexpr int vectors = 2 * groups;
    const auto prefetch = [ahead](const void* p) { Avx2::prefetch(static_cast<const uint8_t*>(p) + ahead); };
    __m256 sum[rows][vectors];
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++) prefetch_first<kFirstCodes>(w[g], prefetch);
    clear<Avx2>(sum);
#pragma GCC unroll 1
    for (int part = 0; part < kParts; part++) {
      __m256i products[rows][vectors];
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const int run = 2 * part + half;
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++) {
#pragma GCC unroll 3
          for (int q = 0; q < 3; q++) prefetch(w[g]->words[run][q]);
          __m256i scales[2];
          run_scales(*w[g], run, scales);
          // A vector after the other: registers are few.
#pragma GCC unroll 2
          for (int of = 0; of < 2; of++) {
            const int v = 2 * g + of;
            __m256i codes[4];
            run_codes(*w[g], run, of, codes);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
              __m256i pairs = _mm256_set1_epi32(x[r][part].starts[half]);
#pragma GCC unroll 4
              for (int q = 0; q < 4; q++) {
                const __m256i of_x = Avx2::four_codes(x[r][part].codes + 16 * half + 4 * q);
                pairs = Avx2::add_words(pairs, _mm256_maddubs_epi16(codes[q], of_x));
              }
              const __m256i of_run = _mm256_madd_epi16(pairs, scales[of]);
              products[r][v] = half == 0 ? Avx2::held(of_run) : Avx2::add_ints(products[r][v], of_run);
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_set1_ps(x[r][part].scale);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          sum[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[r][v]), scale, sum[r][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const __m256 d = Avx2::load_half(w[v / 2]->d[8 * (v % 2)]);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) out[r][v] = _mm256_fmadd_ps(d, sum[r][v], out[r][v]);
    }
  }

  static void quads(const Mixed& w, int part, int v, __m256i (&codes)[8]) {
    for (int half = 0; half < 2; half++) {
      __m256i of_run[4];
      run_codes(w, 2 * part + half, v, of_run);
      std::copy(of_run, of_run + 4, codes + 4 * half);
    }
  }
  static void scales(const Mixed& w, int part, int v, __m256 (&of_runs)[2]) {
    const __m256 d = Avx2::load_half(w.d[8 * v]);
    for (int run = 0; run < 2; run++) {
      of_runs[run] = _mm256_mul_ps(Avx2::load_bytes(w.scales[2 * part + run] + 8 * v), d);
    }
  }
};

}  // namespace
}  // namespace kvfold
