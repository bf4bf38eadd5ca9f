// Rows to float32, and 16 rows folded by columns (kernels/latent_kernels.h), in 256-bit vectors.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/quant_formats.h"
#include "simd/avx2_codes.h"

namespace kvfold {
namespace {

template <class T>
struct Decode32 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    for (const float* end = out + k; out < end; out += 32, p += sizeof(T)) {
      alignas(32) int8_t codes[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes), Codes32<T>::codes(p));
      const __m256 scale = _mm256_set1_ps(block_scale(p)), zero = _mm256_set1_ps(Parts<T>::kWide ? 0 : 8);
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
