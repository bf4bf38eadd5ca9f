// Row dots of types in 256-bit vectors, and their blocks taken apart for panels. What a set S with wider
// vectors has no code of its own for it has from here, with its own dots of bytes and zero points.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/quant_formats.h"
#include "simd/avx2_codes.h"

namespace kvfold {
namespace {

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

// Weights that need all of int8, times x as magnitudes m and signs s, 0 or -1: w x = m (w ^ s) - m s, of
// which the second part is known beforehand. An exclusive or may take any port, a sign has two.
inline __m256i wide_pairs(__m256i w, const DotRow& x, int64_t at) {
  return _mm256_maddubs_epi16(Avx2::load_codes(x.magnitudes + at),
                              _mm256_xor_si256(w, Avx2::load_codes(x.signs + at)));
}

// All whole groups of eight blocks of a row; the number of their blocks. What is left of the row is asked
// for, too.
template <class Dot, int rows>
inline int64_t groups_of_eight(const uint8_t* row, int64_t num_blocks, const DotRow* x, int64_t ahead,
                               DotSums<rows>& sums) {
  constexpr int64_t kBytes = 8 * Dot::kBytes;
  int64_t block = 0;
  for (; block + 8 <= num_blocks; block += 8, row += kBytes) {
    Avx2::prefetch_all<kBytes>(row, ahead);
    Dot::template group<rows, 8>(row, x, block, sums);
  }
  if (block < num_blocks) Avx2::prefetch_all<kBytes>(row, ahead);
  return block;
}

// 32 nibbles under one float16, or two, the second the minimum, with fifth bits before them in Q5_0 and Q5_1.
// Two blocks a vector: a lane has 16 weights of one.
template <class S, class T>
struct DotNibbles {
  static constexpr bool kHasMin = Parts<T>::kHasMin;
  static constexpr int64_t kBytes = sizeof(T), kNibbles = kBytes - 16,
                           kFifths = kHasMin ? 4 : 2;  // where they begin
  static constexpr bool kHasFifth = kNibbles > kFifths;
  static constexpr bool kWide = Format<S, T>::Like::kWide;
  // What is subtracted: this times the minimums, or scales where there are none, times the sums of x.
  static constexpr float kZero = kHasMin ? -1.0f : kWide ? 1.0f : static_cast<float>(Format<S, T>::kZero);
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
      return _mm256_add_epi32(Avx2::widened(wide_pairs(low, x, at)),
                              Avx2::widened(wide_pairs(high, x, at + 32)));
    } else {
      return S::fours(low, Avx2::load_codes(x.codes + at), high, Avx2::load_codes(x.codes + at + 32));
    }
  }

  // 16 bytes from there, and from the same place in the next block.
  template <int64_t bytes>
  static __m256i two_blocks(const uint8_t* p) {
    if constexpr (bytes == 16) return Avx2::load_codes(p);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(Avx2::load16(p)), Avx2::load16(p + bytes), 1);
  }

  template <int rows, int blocks>
  static void group(const uint8_t* p, const DotRow* x, int64_t block, DotSums<rows>& sums) {
    const __m256 d = block_scales<kBytes, blocks>(p);
    const __m256 zero = kHasMin ? block_scales<kBytes, blocks>(p + 2) : d;
    add<rows, blocks, kBytes>(p + kNibbles, d, zero, x, block, sums);
  }
  // Of blocks whose nibbles lie `bytes` apart.
  template <int rows, int blocks, int64_t bytes>
  static void add(const uint8_t* p, __m256 d, __m256 zero, const DotRow* x, int64_t block,
                  DotSums<rows>& sums) {
    constexpr int kPairs = blocks / 2;
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
    for (int i = 0; i < kPairs; i++) low[i] = two_blocks<bytes>(p + 2 * i * bytes);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; i++) high[i] = _mm256_and_si256(_mm256_srli_epi16(low[i], 4), nibble);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; i++) low[i] = _mm256_and_si256(low[i], nibble);
    if constexpr (Parts<T>::kWide) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i++) {
        low[i] = Codes32<T>::template of<S::kWideZero>(low[i]);
        high[i] = Codes32<T>::template of<S::kWideZero>(high[i]);
      }
    }
    if constexpr (kHasFifth) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i++) {
        const __m256i bits = two_blocks<bytes>(p + 2 * i * bytes + kFifths - kNibbles);
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
    int64_t block = groups_of_eight<DotNibbles, rows>(row, num_blocks, x, ahead, sums);
    row += block * kBytes;
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
    for (int r = 0; r < rows; r++) y[r] = sums.total(r) - kZero * Avx2::sum(sums.minus[r]);
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
        sum[i] = Avx2::widened(wide_pairs(Avx2::load_codes(p + i * kBytes + 2), x[r], 32 * (block + i)));
#pragma GCC unroll 8
      for (int i = 0; i < blocks; i++) sums.add(r, i, sum[i], _mm256_broadcast_ss(scale[r] + i));
    }
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    DotSums<rows> sums;
    const int64_t num_blocks = k / 32;
    int64_t block = groups_of_eight<Dot34, rows>(row, num_blocks, x, ahead, sums);
    row += block * kBytes;
    for (; block + 2 <= num_blocks; block += 2, row += 2 * kBytes) group<rows, 2>(row, x, block, sums);
    if (block < num_blocks) group<rows, 1>(row, x, block, sums);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = sums.total(r) - Avx2::sum(sums.minus[r]);
  }
};

template <class T>
struct Fast32 : std::conditional_t<std::is_same_v<T, blocks::Q8_0>, Dot34, DotNibbles<Avx2, T>>,
                TakesApart<T> {
  static constexpr bool kDot = true, kUnpack = false, kQuads = !Parts<T>::kHasMin;

  static __m256 quads(const uint8_t* raw, int64_t row_bytes, __m256i (&out)[8]) {
    Fast32::quad_codes(raw, row_bytes, out);
    const auto at = [&](int64_t i) { return static_cast<int16_t>(blocks::load16(raw + i * row_bytes)); };
    return _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
  }
};

// Types of 256 weights in runs of 32 with minimums.
template <class S, class T>
struct DotRunsOf32 {
  static constexpr int place(int piece) { return piece; }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    DotSums<rows> sums;
    for (int64_t at = 0; at < k; at += 256, row += sizeof(T)) {
      Avx2::prefetch_all<sizeof(T)>(row, ahead);
      __m256 d, minimum;
      Codes256<T>::scales(row, &d, &minimum);
      alignas(32) float scale[rows][8];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        _mm256_store_ps(scale[r], _mm256_mul_ps(d, _mm256_loadu_ps(x[r].scales + at / 32)));
        sums.minus[r] = _mm256_fmadd_ps(minimum, _mm256_loadu_ps(x[r].sums + at / 32), sums.minus[r]);
      }
      __m256i vectors[8];
      Codes256<T>::codes(row, vectors);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        __m256i sum[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum[i] = S::fours(vectors[i], Avx2::load_codes(x[r].codes + at + 32 * i));
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums.add(r, i, sum[i], _mm256_broadcast_ss(scale[r] + i));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = sums.total(r) - Avx2::sum(sums.minus[r]);
  }
};

template <class S>
struct DotRunsOf32<S, blocks::IQ4_XS> {
  using Runs = DotNibbles<S, blocks::IQ4_NL>;
  static constexpr int place(int piece) { return Runs::place(piece); }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    using Codes = Codes256<blocks::IQ4_XS>;
    DotSums<rows> sums;
    for (int64_t at = 0; at < k; at += 256, row += sizeof(blocks::IQ4_XS)) {
      Avx2::prefetch_all<sizeof(blocks::IQ4_XS)>(row, ahead);
      __m256 d;
      Codes::scales(row, &d, nullptr);
      Runs::template add<rows, 8, 16>(row + Codes::kNibbles, d, d, x, at / 32, sums);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) y[r] = sums.total(r) - Runs::kZero * Avx2::sum(sums.minus[r]);
  }
};

// Runs of 16, two a vector, a lane each: four vectors at a time become one sum a run before anything is
// scaled. Sums of four products fit int16: 4 * 63 * 127.
template <class S, class T>
struct DotRunsOf16 {
  static constexpr int place(int piece) { return piece; }

  // Runs 0, 2, 4, 6, then 1, 3, 5, 7.
  static __m256i sums_of_runs(const __m256i (&codes)[4], const int8_t* x) {
    static_assert(4 * 127 * Parts<T>::kMost <= 32767);
    __m256i sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i] = S::fours(codes[i], Avx2::load_codes(x + 32 * i));
    return _mm256_hadd_epi32(Avx2::widened(_mm256_packs_epi32(sum[0], sum[1])),
                             Avx2::widened(_mm256_packs_epi32(sum[2], sum[3])));
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    constexpr bool kHasMin = Parts<T>::kHasMin;
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    __m256 sum[rows], minus[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm256_setzero_ps();
    for (int64_t at = 0; at < k; at += 256, row += sizeof(T)) {
      Avx2::prefetch_all<sizeof(T)>(row, ahead);
      __m256 d[2], minimum[2];
      Codes256<T>::scales(row, d, minimum);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m256i vectors[4];
        Codes256<T>::half_codes(row, half, vectors);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          const int64_t run = at / 16 + 8 * half;
          const __m256 scale = _mm256_mul_ps(d[half], _mm256_loadu_ps(x[r].scales + run));
          minus[r] =
              _mm256_fmadd_ps(kHasMin ? minimum[half] : d[half], _mm256_loadu_ps(x[r].sums + run), minus[r]);
          sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums_of_runs(vectors, x[r].codes + 16 * run)),
                                   _mm256_permutevar8x32_ps(scale, order), sum[r]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const float zero = kHasMin ? 1.0f : static_cast<float>(Parts<T>::kZero);
      y[r] = Avx2::sum(_mm256_fnmadd_ps(_mm256_set1_ps(zero), minus[r], sum[r]));
    }
  }
};

template <class S, class T>
struct Fast256 : std::conditional_t<Parts<T>::kRun == 16, DotRunsOf16<S, T>, DotRunsOf32<S, T>>,
                 TakesApart<T> {
  static constexpr bool kDot = true, kUnpack = false, kQuads = false;
};

template <class T>
struct Fast<Avx2, T> : ByCodes<T, Fast32<T>, Fast256<Avx2, T>, NoFast> {};

}  // namespace
}  // namespace kvfold
