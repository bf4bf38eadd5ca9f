// Rows to float32, and 16 rows folded by columns (kernels/latent_kernels.h), in 256-bit vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/quant_formats.h"
#include "simd/avx2_codes.h"

namespace kvfold {
namespace {

// Codes less what they have on top of levels, as signed bytes.
template <class T>
inline __m256i levels(__m256i codes) {
  if constexpr (Parts<T>::kWide || Parts<T>::kZero == 0) {
    return codes;
  } else {
    return _mm256_sub_epi8(codes, _mm256_set1_epi8(Parts<T>::kZero));
  }
}

// A scale times a level is exact, so a weight with a minimum is rounded once, as in decode_blocks.h.
template <class T>
struct Decode32 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    for (const float* end = out + k; out < end; out += 32, p += sizeof(T)) {
      alignas(32) int8_t block[32];
      Avx2::store_codes(block, levels<T>(Codes32<T>::codes(p)));
      const __m256 scale = _mm256_set1_ps(block_scale(p));
      for (int i = 0; i < 32; i += 8) {
        const __m256 level = Avx2::load_bytes(block + i);
        if constexpr (Parts<T>::kHasMin) {
          Avx2::store(out + i, _mm256_fmadd_ps(scale, level, _mm256_set1_ps(block_scale(p + 2))));
        } else {
          Avx2::store(out + i, _mm256_mul_ps(scale, level));
        }
      }
    }
  }
};
template <>
struct FastDecode<Avx2, blocks::Q4_0> : Decode32<blocks::Q4_0> {};
template <>
struct FastDecode<Avx2, blocks::Q4_1> : Decode32<blocks::Q4_1> {};
template <>
struct FastDecode<Avx2, blocks::Q5_0> : Decode32<blocks::Q5_0> {};
template <>
struct FastDecode<Avx2, blocks::Q5_1> : Decode32<blocks::Q5_1> {};
template <>
struct FastDecode<Avx2, blocks::IQ4_NL> : Decode32<blocks::IQ4_NL> {};
template <>
struct FastDecode<Avx2, blocks::Q8_0> : Decode32<blocks::Q8_0> {};

template <class T>
struct Decode256 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    constexpr int kRun = Parts<T>::kRun, kRuns = 256 / kRun;
    for (const float* end = out + k; out < end; p += sizeof(T)) {
      alignas(32) float scales[kRuns], minimums[kRuns];
      alignas(32) int8_t block[kRuns][kRun];
      take_scales<T>(p, scales, minimums);
      __m256i vectors[8];
      Codes256<T>::codes(p, vectors);
      for (int i = 0; i < 8; i++) Avx2::store_codes(block[0] + 32 * i, levels<T>(vectors[i]));
      for (int run = 0; run < kRuns; run++) {
        const __m256 scale = _mm256_set1_ps(scales[run]);
        for (int i = 0; i < kRun; i += 8, out += 8) {
          const __m256 level = Avx2::load_bytes(block[run] + i);
          if constexpr (Parts<T>::kHasMin) {
            Avx2::store(out, _mm256_fmsub_ps(scale, level, _mm256_set1_ps(minimums[run])));
          } else {
            Avx2::store(out, _mm256_mul_ps(scale, level));
          }
        }
      }
    }
  }
};
template <>
struct FastDecode<Avx2, blocks::Q2_K> : Decode256<blocks::Q2_K> {};
template <>
struct FastDecode<Avx2, blocks::Q3_K> : Decode256<blocks::Q3_K> {};
template <>
struct FastDecode<Avx2, blocks::Q4_K> : Decode256<blocks::Q4_K> {};
template <>
struct FastDecode<Avx2, blocks::Q5_K> : Decode256<blocks::Q5_K> {};
template <>
struct FastDecode<Avx2, blocks::Q6_K> : Decode256<blocks::Q6_K> {};
template <>
struct FastDecode<Avx2, blocks::IQ4_XS> : Decode256<blocks::IQ4_XS> {};

template <>
struct FastDecode<Avx2, F16Numbers> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) Avx2::store(out + i, Avx2::load_half(p + 2 * i));
    for (; i < k; i++) out[i] = blocks::half_at(p + 2 * i);
  }
};

// Folding goes in stages: bytes of all rows, then their products, 32 columns at a time.
constexpr int kFoldedRows = 16;

// out[c] += start of its run + sum over rows j of level c of row j times the factor of its run: factors + j *
// stride has those of the 32 columns.
template <int run>
inline void fold_levels(const int8_t (*rows)[32], const float* factors, int stride,
                        const __m256 (&start)[32 / run], float* out) {
  __m256 sum[2][4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) sum[0][v] = Avx2::load(out + 8 * v), sum[1][v] = start[8 * v / run];
#pragma GCC unroll 16
  for (int j = 0; j < kFoldedRows; j++) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      const __m256 factor = _mm256_broadcast_ss(factors + j * stride + 8 * v / run);
      sum[j % 2][v] = _mm256_fmadd_ps(factor, Avx2::load_bytes(rows[j] + 8 * v), sum[j % 2][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) Avx2::store(out + 8 * v, _mm256_add_ps(sum[0][v], sum[1][v]));
}

template <class T>
struct Fold32 {
  static constexpr int64_t kBytes = sizeof(T);

  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    constexpr int64_t kLines = (kFoldedRows * kBytes + 63) / 64;  // of 16 blocks
    for (const float* end = out + k; out < end; out += 32, rows += kBytes) {
      for (int64_t line = 0; line < kLines; line++, next += 64) Avx2::prefetch(next);
      alignas(32) uint16_t halves[2][kFoldedRows];
      alignas(32) int8_t block[kFoldedRows][32];
#pragma GCC unroll 16
      for (int j = 0; j < kFoldedRows; j++) {
        const uint8_t* from = rows + j * row_bytes;
        halves[0][j] = blocks::load16(from);
        if constexpr (Parts<T>::kHasMin) halves[1][j] = blocks::load16(from + 2);
        Avx2::store_codes(block[j], levels<T>(Codes32<T>::codes(from)));
      }
      alignas(32) float scaled[kFoldedRows];
      __m256 minimums[1] = {Avx2::zero()};
      for (int j = 0; j < kFoldedRows; j += 8) {
        const auto times_x = [&](const uint16_t* of) {
          return _mm256_mul_ps(Avx2::load_half(reinterpret_cast<const uint8_t*>(of + j)), Avx2::load(x + j));
        };
        Avx2::store(scaled + j, times_x(halves[0]));
        if constexpr (Parts<T>::kHasMin) minimums[0] = _mm256_add_ps(minimums[0], times_x(halves[1]));
      }
      if constexpr (Parts<T>::kHasMin) minimums[0] = _mm256_set1_ps(Avx2::sum(minimums[0]));
      fold_levels<32>(block, scaled, 1, minimums, out);
    }
  }
};
template <>
struct FastFold<Avx2, blocks::Q4_0> : Fold32<blocks::Q4_0> {};
template <>
struct FastFold<Avx2, blocks::Q4_1> : Fold32<blocks::Q4_1> {};
template <>
struct FastFold<Avx2, blocks::Q5_0> : Fold32<blocks::Q5_0> {};
template <>
struct FastFold<Avx2, blocks::Q5_1> : Fold32<blocks::Q5_1> {};
template <>
struct FastFold<Avx2, blocks::IQ4_NL> : Fold32<blocks::IQ4_NL> {};
template <>
struct FastFold<Avx2, blocks::Q8_0> : Fold32<blocks::Q8_0> {};

template <class T>
struct Fold256 {
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr int kRun = Parts<T>::kRun, kRuns = 256 / kRun;

  // The minimums of a run, times x, are one number for its columns.
  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    constexpr int64_t kQuarter = kFoldedRows * kBytes / 4;  // of 16 blocks, for 64 columns
    for (const float* end = out + k; out < end; rows += kBytes) {
      alignas(32) float scaled[kFoldedRows][kRuns], least[kRuns];
      alignas(32) int8_t block[8][kFoldedRows][32];
      __m256 sum_of_least[kRuns / 8] = {};
      for (int j = 0; j < kFoldedRows; j++) {
        const __m256 factor = _mm256_set1_ps(x[j]);
        alignas(32) float minimums[kRuns];
        take_scales<T>(rows + j * row_bytes, scaled[j], minimums);
        for (int run = 0; run < kRuns; run += 8) {
          Avx2::store(scaled[j] + run, _mm256_mul_ps(Avx2::load(scaled[j] + run), factor));
          if constexpr (Parts<T>::kHasMin) {
            __m256& sum = sum_of_least[run / 8];
            sum = _mm256_fnmadd_ps(Avx2::load(minimums + run), factor, sum);
          }
        }
        __m256i vectors[8];
        Codes256<T>::codes(rows + j * row_bytes, vectors);
        for (int i = 0; i < 8; i++) Avx2::store_codes(block[i][j], levels<T>(vectors[i]));
      }
      for (int run = 0; run < kRuns; run += 8) Avx2::store(least + run, sum_of_least[run / 8]);
      for (int i = 0; i < 8; i++, out += 32) {
        if (i % 2 == 0) {
          Avx2::prefetch_all<kQuarter>(next, 0);
          next += kQuarter;
        }
        __m256 start[32 / kRun];
        for (int run = 0; run < 32 / kRun; run++) start[run] = _mm256_set1_ps(least[32 / kRun * i + run]);
        fold_levels<kRun>(block[i], scaled[0] + 32 / kRun * i, kRuns, start, out);
      }
    }
  }
};
template <>
struct FastFold<Avx2, blocks::Q2_K> : Fold256<blocks::Q2_K> {};
template <>
struct FastFold<Avx2, blocks::Q3_K> : Fold256<blocks::Q3_K> {};
template <>
struct FastFold<Avx2, blocks::Q4_K> : Fold256<blocks::Q4_K> {};
template <>
struct FastFold<Avx2, blocks::Q5_K> : Fold256<blocks::Q5_K> {};
template <>
struct FastFold<Avx2, blocks::Q6_K> : Fold256<blocks::Q6_K> {};
template <>
struct FastFold<Avx2, blocks::IQ4_XS> : Fold256<blocks::IQ4_XS> {};

}  // namespace
}  // namespace kvfold
