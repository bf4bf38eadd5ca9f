// Row dots and panels of rows side by side (kernels/side_by_side_dot.h) in 512-bit vectors: the 16 rows of a
// group are one vector.
#pragma once

#include "kernels/side_by_side_dot.h"
#include "simd/avx512.h"

namespace kvfold {
namespace {

template <class T>
struct Avx512SideBySide {
  using Set = Avx512;
  using Type = T;
  using Mixed = SideBySide<T>;
  static constexpr int kZero = Format<Avx512, T>::kZero;
  static constexpr bool kNibbles = sizeof(T::qs) == 16, kFifth = sizeof(T) == 22;
  // Words of nibbles, or of codes, and how many of fifth bits there are before them.
  static constexpr int kWords = sizeof(T::qs) / 4, kFirst = Mixed::num_words - kWords;
  using X = ZeroLanes<kZero>;

  // Two threads of an Emerald Rapids from memory, GB/s of Q8_0 and of IQ4_NL (docs/notes/cpu-kernels.md,
  // "AVX-512: rows side by side", where one stream is read at 25.9): one stream 2, 4 and 8 KiB ahead 22.7,
  // 24.3, 24.0 and 18.4, 21.2, 20.9; two streams 25.1, 24.8, 24.4 and 21.8, 21.7, 21.0; two streams 4 KiB
  // ahead that go on with the next unit 25.5 and 22.5, and with every line asked for between the products of
  // a block 25.6 and 22.9. Row by row, 8 KiB ahead: 20.2 and 18.5.
  static constexpr int kMostRows = 4, kStreams = 2;
  static constexpr int64_t kAhead = 4096;

  static __m512i load(const Mixed& w, int word) { return Avx512::load_codes(w.words[kFirst + word]); }

  // The codes of a block, four columns a vector; signed ones are levels.
  template <bool is_signed>
  static __m512i quad(const Mixed& w, int q) {
    if constexpr (kNibbles) {
      using Codes = std::conditional_t<is_signed && !kFifth, SignedNibbles<T>, Nibbles<T>>;
      const __m512i packed = load(w, q % 4), nibbles = q < 4 ? Codes::low(packed) : Codes::high(packed);
      if constexpr (!kFifth) return nibbles;
      return FastNibbles<T>::template quad_codes<is_signed>(nibbles, Avx512::load_codes(w.words[0]), q);
    } else {
      return is_signed ? load(w, q) : _mm512_xor_si512(load(w, q), _mm512_set1_epi8(-128));
    }
  }

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m512 (&out)[rows][groups]) {
    const auto prefetch = [ahead](const uint8_t* p) { Avx512::prefetch_here(p + ahead); };
    __m512i sum[rows][groups];
    KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
      KVFOLD_UNROLLED for (int g = 0; g < groups; g++) sum[r][g] = _mm512_set1_epi32(x[r]->start);
    }
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
      prefetch(w[g]->scales[0]);
      if constexpr (kFifth) prefetch(w[g]->words[0][0]);
    }
    KVFOLD_UNROLLED for (int word = 0; word < kWords; word++) {
      KVFOLD_UNROLLED for (int g = 0; g < groups; g++) prefetch(w[g]->words[kFirst + word][0]);
      KVFOLD_UNROLLED for (int q = word; q < 8; q += kWords) {
        __m512i codes[groups];
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) codes[g] = quad<false>(*w[g], q);
        KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
          const __m512i of_x = Avx512::four_codes(x[r]->codes + 4 * q);
          KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
            sum[r][g] = _mm512_dpbusd_epi32(sum[r][g], codes[g], of_x);
          }
        }
      }
      KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) Avx512::settled(sum[r][g]);
      }
    }
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
      const __m512 d = scales(*w[g]);
      KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x[r]->scale));
        out[r][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][g]), scale, out[r][g]);
      }
    }
  }

  template <bool is_signed>
  static void quads_of(const Mixed& w, __m512i (&codes)[8]) {
    KVFOLD_UNROLLED for (int q = 0; q < 8; q++) codes[q] = quad<is_signed>(w, q);
  }
  static void quads(const Mixed& w, int, int, __m512i (&codes)[8]) { quads_of<false>(w, codes); }
  static __m512 scales(const Mixed& w) { return Avx512::load_half(w.scales[0]); }
  static void scales(const Mixed& w, int, int, __m512 (&of_block)[1]) { of_block[0] = scales(w); }
};

// For tiles in hardware, whose panels have signed levels.
template <class T>
struct LevelsSideBySide : Avx512SideBySide<T> {
  using Mixed = SideBySide<T>;
  static void quads(const Mixed& w, int, int, __m512i (&codes)[8]) {
    Avx512SideBySide<T>::template quads_of<true>(w, codes);
  }
};

}  // namespace
}  // namespace kvfold
