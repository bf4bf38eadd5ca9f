// Row dots and panels of rows side by side (kernels/side_by_side_dot.h) in 512-bit vectors: the 16 rows of a
// group are one vector.
#pragma once

#include "kernels/side_by_side_dot.h"
#include "simd/avx512_dots.h"

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
  using X = ZeroLanes<kZero, 1, false>;

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
      KVFOLD_UNROLLED for (int g = 0; g < groups; g++) sum[r][g] = _mm512_set1_epi32(x[r]->starts[0]);
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
  static void quads_of(const Mixed& w, int, __m512i (&codes)[8]) {
    KVFOLD_UNROLLED for (int q = 0; q < 8; q++) codes[q] = quad<is_signed>(w, q);
  }
  static void quads(const Mixed& w, int part, int, __m512i (&codes)[8]) { quads_of<false>(w, part, codes); }
  static __m512 scales(const Mixed& w) { return Avx512::load_half(w.scales[0]); }
  static void scales(const Mixed& w, int, int, __m512 (&of_block)[1]) { of_block[0] = scales(w); }
};

template <>
struct Avx512SideBySide<blocks::Q4_K> {
  using Set = Avx512;
  using Type = blocks::Q4_K;
  using Mixed = SideBySide<Type>;
  using X = MinLanes;

  // As for IQ4_NL, whose 288 bytes for 32 columns take about as many instructions.
  static constexpr int kMostRows = 4, kStreams = 2;
  static constexpr int64_t kAhead = 4096;

  static constexpr int kRuns = 8;
  static constexpr int64_t kFirstCodes = offsetof(Mixed, words);

  // Scales of all runs, or minimums, as bytes [run][row].
  struct OfRuns {
    alignas(64) uint8_t scales[kRuns][16], minimums[kRuns][16];

    void take(const Mixed& w) {
      const __m512i low = _mm512_set1_epi8(15), top = _mm512_set1_epi8(0x30);
      const __m512i upper = Avx512::load_codes(w.upper);
      const auto join = [&](__m512i below, __m512i above) {  // below & 15 | above & 0x30
        return _mm512_ternarylogic_epi32(_mm512_and_si512(below, low), above, top, 0xf8);
      };
      const __m512i first = Avx512::load_codes(w.lower), last = Avx512::load_codes(w.lower[4]);
      Avx512::store_codes(scales, join(first, _mm512_slli_epi16(upper, 4)));
      Avx512::store_codes(minimums, join(_mm512_srli_epi16(first, 4), _mm512_slli_epi16(upper, 2)));
      Avx512::store_codes(scales[4], join(last, upper));
      Avx512::store_codes(minimums[4], join(_mm512_srli_epi16(last, 4), _mm512_srli_epi16(upper, 2)));
    }
  };
  static __m512 numbers(const uint8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(Avx512::load16(bytes)));
  }

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m512 (&out)[rows][groups]) {
    const auto prefetch = [ahead](const void* p) {
      Avx512::prefetch_here(static_cast<const uint8_t*>(p) + ahead);
    };
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sum[rows][groups], least[rows][groups];
    OfRuns of_runs[groups];
    clear<Avx512>(sum), clear<Avx512>(least);
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
      prefetch_first<kFirstCodes>(w[g], prefetch);
      of_runs[g].take(*w[g]);
    }
#pragma GCC unroll 1
    for (int run = 0; run < kRuns; run++) {
      __m512i products[rows][groups];
      KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) products[r][g] = _mm512_setzero_si512();
      }
      KVFOLD_UNROLLED for (int q = 0; q < 4; q++) {
        __m512i low[groups], high[groups];
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
          prefetch(w[g]->words[run][q]);
          const __m512i packed = Avx512::load_codes(w[g]->words[run][q]);
          low[g] = _mm512_and_si512(packed, nibble);
          high[g] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
        }
        KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
          const __m512i of_low = Avx512::four_codes(x[r][run].codes + 4 * q),
                        of_high = Avx512::four_codes(x[r][run].codes + 16 + 4 * q);
          KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
            products[r][g] = _mm512_dpbusd_epi32(products[r][g], low[g], of_low);
            products[r][g] = _mm512_dpbusd_epi32(products[r][g], high[g], of_high);
            Avx512::settled(products[r][g]);
          }
        }
      }
      KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
        const __m512 scale = numbers(of_runs[g].scales[run]), minimum = numbers(of_runs[g].minimums[run]);
        KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
          const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x[r][run].scale));
          sum[r][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][g]), factor, sum[r][g]);
          least[r][g] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x[r][run].sum), least[r][g]);
        }
      }
    }
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
      const __m512 d = Avx512::load_half(w[g]->d[0]), dmin = Avx512::load_half(w[g]->dmin[0]);
      KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
        out[r][g] = _mm512_fnmadd_ps(dmin, least[r][g], _mm512_fmadd_ps(d, sum[r][g], out[r][g]));
      }
    }
  }

  // Codes are levels.
  template <bool is_signed>
  static void quads_of(const Mixed& w, int run, __m512i (&codes)[8]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    KVFOLD_UNROLLED for (int q = 0; q < 4; q++) {
      const __m512i packed = Avx512::load_codes(w.words[run][q]);
      codes[q] = _mm512_and_si512(packed, nibble);
      codes[4 + q] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
    }
  }
  static void quads(const Mixed& w, int run, int, __m512i (&codes)[8]) { quads_of<false>(w, run, codes); }
  static void scales(const Mixed& w, int run, int, __m512 (&of_run)[2]) {
    const __m512i lower = _mm512_cvtepu8_epi32(Avx512::load16(w.lower[run])),
                  upper =
                      _mm512_srli_epi32(_mm512_cvtepu8_epi32(Avx512::load16(w.upper[run % 4])), run / 4 * 4);
    const __m512i scale =
        _mm512_or_si512(_mm512_and_si512(lower, _mm512_set1_epi32(15)),
                        _mm512_slli_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(3)), 4));
    const __m512i minimum = _mm512_or_si512(
        _mm512_srli_epi32(lower, 4), _mm512_slli_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(12)), 2));
    const __m512 d = Avx512::load_half(w.d[0]), dmin = Avx512::load_half(w.dmin[0]);
    of_run[0] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(scale));
    of_run[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(minimum), _mm512_sub_ps(_mm512_setzero_ps(), dmin));
  }
};

template <>
struct Avx512SideBySide<blocks::Q6_K> {
  using Set = Avx512;
  using Type = blocks::Q6_K;
  using Mixed = SideBySide<Type>;
  using X = ZeroLanes<32, 2, false>;
  static_assert(Format<Avx512, Type>::kZero == 32);

  // In the order before: two threads of an Emerald Rapids from memory, which read 21.9 GB/s, row by row 17.9:
  // two streams 2, 4 and 6.6 KiB ahead 19.8, 19.2, 19.8, one stream 4 KiB ahead 18.5.
  static constexpr int kMostRows = 4, kStreams = 2;
  static constexpr int64_t kAhead = 2048;

  static constexpr int kParts = Type::elements / 32;
  static constexpr int64_t kFirstCodes = offsetof(Mixed, words);

  // The codes of a run, four columns each.
  static void run_codes(const Mixed& w, int run, __m512i (&codes)[4]) {
    const __m512i six = _mm512_set1_epi8(63);
    __m512i words[3];
    KVFOLD_UNROLLED for (int q = 0; q < 3; q++) {
      words[q] = Avx512::load_codes(w.words[run][q]);
      codes[q] = _mm512_and_si512(words[q], six);
    }
    const __m512i fourth =
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(words[0], 2), _mm512_srli_epi32(words[1], 4),
                                  _mm512_srli_epi32(words[2], 6), 0x96);  // a ^ b ^ c
    codes[3] = _mm512_and_si512(fourth, six);
  }
  static __m512 numbers(const int8_t* scales) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))));
  }

  template <int rows, int groups>
  static void block(const Mixed* const (&w)[groups], const X* const (&x)[rows], int64_t ahead,
                    __m512 (&out)[rows][groups]) {
    const auto prefetch = [ahead](const void* p) {
      Avx512::prefetch_here(static_cast<const uint8_t*>(p) + ahead);
    };
    __m512 sum[rows][groups];
    clear<Avx512>(sum);
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) prefetch_first<kFirstCodes>(w[g], prefetch);
#pragma GCC unroll 1
    for (int part = 0; part < kParts; part++) {
      __m512 products[rows][groups];
      KVFOLD_UNROLLED for (int half = 0; half < 2; half++) {
        const int run = 2 * part + half;
        __m512i of_run[rows][groups], codes[groups][4];
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
          KVFOLD_UNROLLED for (int q = 0; q < 3; q++) prefetch(w[g]->words[run][q]);
          run_codes(*w[g], run, codes[g]);
        }
        KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
          KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
            of_run[r][g] = _mm512_set1_epi32(x[r][part].starts[half]);
          }
          KVFOLD_UNROLLED for (int q = 0; q < 4; q++) {
            const __m512i of_x = Avx512::four_codes(x[r][part].codes + 16 * half + 4 * q);
            KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
              of_run[r][g] = _mm512_dpbusd_epi32(of_run[r][g], codes[g][q], of_x);
              Avx512::settled(of_run[r][g]);
            }
          }
        }
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
          const __m512 scale = numbers(w[g]->scales[run]);
          KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
            const __m512 whole = _mm512_cvtepi32_ps(of_run[r][g]);
            products[r][g] =
                half == 0 ? _mm512_mul_ps(whole, scale) : _mm512_fmadd_ps(whole, scale, products[r][g]);
          }
        }
      }
      KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_set1_ps(x[r][part].scale);
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
          sum[r][g] = _mm512_fmadd_ps(products[r][g], scale, sum[r][g]);
        }
      }
    }
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
      const __m512 d = Avx512::load_half(w[g]->d[0]);
      KVFOLD_UNROLLED for (int r = 0; r < rows; r++) out[r][g] = _mm512_fmadd_ps(d, sum[r][g], out[r][g]);
    }
  }

  static void quads(const Mixed& w, int part, int, __m512i (&codes)[8]) {
    KVFOLD_UNROLLED for (int half = 0; half < 2; half++) {
      __m512i of_run[4];
      run_codes(w, 2 * part + half, of_run);
      KVFOLD_UNROLLED for (int q = 0; q < 4; q++) codes[4 * half + q] = of_run[q];
    }
  }
  static void scales(const Mixed& w, int part, int, __m512 (&of_runs)[2]) {
    const __m512 d = Avx512::load_half(w.d[0]);
    for (int run = 0; run < 2; run++) of_runs[run] = _mm512_mul_ps(numbers(w.scales[2 * part + run]), d);
  }
};

// For tiles in hardware, whose panels have signed levels.
template <class T>
struct LevelsSideBySide : Avx512SideBySide<T> {
  using Mixed = SideBySide<T>;
  static void quads(const Mixed& w, int part, int, __m512i (&codes)[8]) {
    Avx512SideBySide<T>::template quads_of<true>(w, part, codes);
  }
};

}  // namespace
}  // namespace kvfold
