// Row dots and panels of rows side by side (kernels/side_by_side.h), in 256-bit vectors: the 16 rows of a
// group are two vectors of eight lanes, one row a lane.
//
// A lane meets four codes of x at a time, the same ones for all rows, so x is broadcast from memory, which
// takes no vector port. Against rows one by one (simd/avx2.h) nothing is summed across a vector and eight
// scales are one load: 25 instead of 15 GB/s for IQ4_NL in the second-level cache, 38 instead of 20 for Q4_0,
// 60 instead of 27 for Q8_0 (one thread of a Zen 3).
#pragma once

#include "kernels/quant_dot.h"
#include "kernels/quant_tile.h"
#include "kernels/side_by_side.h"
#include "simd/avx2.h"

namespace kvfold {
namespace {

// 32 activations as a row dot of these reads them. `start` is what a sum in int32 begins with.
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
template <int zero>
struct ZeroLanes {
  int8_t codes[32];
  float scale;
  int32_t start;

  void set(const int8_t* of_x, const int32_t* halves, float x_scale) {
    std::memcpy(codes, of_x, 32);
    scale = x_scale;
    start = -zero * (halves[0] + halves[1]);
  }
};

template <class T>
struct SideBySideProducts {
  using Mixed = SideBySide<T>;
  using Like = typename Format<Avx2, T>::Like;
  static constexpr bool kWide = Like::kWide, kNibbles = sizeof(T::qs) == 16, kFifth = sizeof(T) == 22;
  // Words of nibbles, or of codes, and how many of fifth bits there are before them.
  static constexpr int kWords = sizeof(T::qs) / 4, kFirst = Mixed::num_words - kWords;
  static constexpr int kPairs = Format<Avx2, T>::kPairs;  // that add up in int16
  using X = std::conditional_t<kWide, WideLanes, ZeroLanes<Format<Avx2, T>::kZero>>;
  using Dot = AnyDot<Avx2, Like>;
  using Tile = typename QuantTile<Avx2, T>::Any;
  static_assert(T::elements == kBlock && Tile::kRows % kRowsSideBySide == 0);
  // Prepared rows take no more than where rows lie one by one, so that weights may move between the two.
  static_assert(sizeof(X) <= Dot::kCodes * kBlock + 2 * sizeof(float));

  // Bytes read ahead. Two threads from memory, GB/s with 1, 1.5, 2, 3 and 4 KiB, medians of three: IQ4_NL 29,
  // 31, 27, 27, 32, Q4_0 33, 34, 28, 26, 30, Q8_0 34, 33, 27, 26, 28.
  static constexpr int64_t kAhead = 1536;

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

  static void prepare(const float* x, int64_t k, uint8_t* prepared) {
    for (int64_t at = 0; at < k; at += kBlock, prepared += sizeof(X)) {
      alignas(32) int8_t codes[kBlock];
      int32_t halves[2];
      const float scale = Avx2::quantize(x + at, codes, halves);
      reinterpret_cast<X*>(prepared)->set(codes, halves, scale);
    }
  }

  // Four columns, `quad` of eight: sums of four products in int32, or of two in int16, of which kPairs fit.
  template <int rows>
  static void add_quad(const X* const (&x)[rows], int quad, const __m256i (&w)[2], __m256i (&sum)[rows][2]) {
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
      if constexpr (kWide) {
        const __m256i magnitude = Avx2::four_codes(x[r]->magnitudes + 4 * quad),
                      sign = Avx2::four_codes(x[r]->signs + 4 * quad);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_xor_si256(w[v], sign));
          sum[r][v] = _mm256_add_epi32(sum[r][v], fours(pairs));
        }
      } else {
        const __m256i codes = Avx2::four_codes(x[r]->codes + 4 * quad);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
          sum[r][v] = _mm256_add_epi16(sum[r][v], _mm256_maddubs_epi16(w[v], codes));
        }
      }
    }
  }

  // Adds sums of two in int16 to sums in int32, and begins anew.
  template <int rows>
  static void widen(__m256i (&pairs)[rows][2], __m256i (&sum)[rows][2]) {
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        sum[r][v] = _mm256_add_epi32(sum[r][v], fours(pairs[r][v]));
        pairs[r][v] = _mm256_setzero_si256();
      }
    }
  }

  template <int rows>
  static void block(const Mixed& w, const X* const (&x)[rows], __m256 (&out)[rows][2]) {
    __m256i sum[rows][2], pairs[rows][2];
    auto& products = kWide ? sum : pairs;
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
      sum[r][0] = sum[r][1] = _mm256_set1_epi32(x[r]->start);
      pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int q = 0; q < kWords; q++) {
      const __m256i packed[2] = {load(w, q, 0), load(w, q, 1)};
      if constexpr (kNibbles) {
        const __m256i low[2] = {with_fifths(w, q, 0, low_codes(packed[0])),
                                with_fifths(w, q, 1, low_codes(packed[1]))};
        add_quad<rows>(x, q, low, products);
        const __m256i high[2] = {with_fifths(w, 4 + q, 0, high_codes(packed[0])),
                                 with_fifths(w, 4 + q, 1, high_codes(packed[1]))};
        add_quad<rows>(x, 4 + q, high, products);
      } else {
        add_quad<rows>(x, q, packed, products);
      }
      if constexpr (!kWide) {
        if ((2 * q + 2) % kPairs == 0) widen<rows>(pairs, sum);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const __m256 d = Avx2::load_half(w.scales[8 * v]);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(x[r]->scale));
        out[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][v]), scale, out[r][v]);
      }
    }
  }

  template <int rows>
  static void group(const Mixed* w, int64_t k, const uint8_t* prepared, float* y, int64_t ldy) {
    const X* x[rows];
    __m256 out[rows][2];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
      x[r] = reinterpret_cast<const X*>(prepared + r * Dot::bytes(k));
      out[r][0] = out[r][1] = _mm256_setzero_ps();
    }
    for (const Mixed* end = w + k / kBlock; w < end; w++) {
      Avx2::prefetch_all<sizeof(Mixed), kAhead>(reinterpret_cast<const uint8_t*>(w));
      block<rows>(*w, x, out);
#pragma GCC unroll 2
      for (int r = 0; r < rows; r++) x[r]++;
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) {
      _mm256_storeu_ps(y + r * ldy, out[r][0]);
      _mm256_storeu_ps(y + r * ldy + 8, out[r][1]);
    }
  }

  // Two rows of x at a time: sums of more do not fit the registers. The next two find the group in cache.
  static void dot(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, const uint8_t* prepared,
                  int64_t count, float* y, int64_t ldy) {
    for (int64_t i = 0; i < n; i += kRowsSideBySide, raw += kRowsSideBySide * row_bytes) {
      for (int64_t r = 0; r < count; r += 2) {
        with_count<2>(count - r, [&](auto rows) {
          group<decltype(rows)::value>(reinterpret_cast<const Mixed*>(raw), k, prepared + r * Dot::bytes(k),
                                       y + r * ldy + i, ldy);
        });
      }
    }
  }

  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, uint8_t* panel) {
    constexpr int kGroupVectors = kRowsSideBySide / Avx2::kLanes;
    Tile::unpack_quads(n, k, panel, [&](int64_t block, int vector, auto& codes) {
      const int v = vector % kGroupVectors;
      const uint8_t* group = raw + vector / kGroupVectors * kRowsSideBySide * row_bytes;
      const Mixed& w = reinterpret_cast<const Mixed*>(group)[block];
      for (int q = 0; q < kWords; q++) {
        const __m256i packed = load(w, q, v);
        if constexpr (kNibbles) {
          codes[q] = with_fifths(w, q, v, low_codes(packed));
          codes[4 + q] = with_fifths(w, 4 + q, v, high_codes(packed));
        } else {
          codes[q] = packed;
        }
      }
      return Avx2::load_half(w.scales[8 * v]);
    });
  }

  static constexpr MatrixKernels kernels(int32_t id) {
    return {side_by_side_id(id),
            Rounding::kInt8,
            kRowsSideBySide,
            Dot::bytes,
            prepare,
            dot,
            Tile::kRows,
            Tile::kCols,
            Avx2::kNearPanels,
            Tile::group_bytes,
            QuantTile<Avx2, T>::prepare,
            Tile::kPanelColumns,
            Tile::panel_bytes,
            unpack,
            Tile::tile};
  }
};

constexpr MatrixKernels kSideBySide[] = {
    SideBySideProducts<blocks::Q4_0>::kernels(2),
    SideBySideProducts<blocks::Q5_0>::kernels(6),
    SideBySideProducts<blocks::Q8_0>::kernels(8),
    SideBySideProducts<blocks::IQ4_NL>::kernels(20),
};

}  // namespace
}  // namespace kvfold
