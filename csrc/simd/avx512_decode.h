// Rows to float32, and 16 rows folded by columns (kernels/latent_kernels.h), in 512-bit vectors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels/quant_formats.h"
#include "simd/avx2_decode.h"
#include "simd/avx512_codes.h"

namespace kvfold {
namespace {

// Types without code of their own below have levels in 256-bit vectors.
template <class T>
struct FastDecode<Avx512, T> : ByCodes<T, Decode32<Avx512, T>, Decode256<Avx512, T>, NoDecode> {};
template <class T>
struct FastFold<Avx512, T> : ByCodes<T, Fold32<Avx512, T>, Fold256<Avx512, T>, NoFold> {};

// Rows to float32. A permutation looks at the low four bits of an index, so nibbles need no masking.
template <class T>
struct DecodeNibbles;  // levels()

template <>
struct DecodeNibbles<blocks::Q4_0> {
  static __m512 levels() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }
};
template <>
struct DecodeNibbles<blocks::IQ4_NL> {
  static __m512 levels() {
    return _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
  }
};

template <class T>
struct Decode18 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    const __m512 levels = DecodeNibbles<T>::levels();
    for (const float* end = out + k; out < end; out += 32, p += 18) {
      const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(p + 2));
      const __m512 d = Avx512::half(p);
      _mm512_storeu_ps(out, _mm512_mul_ps(d, _mm512_permutexvar_ps(packed, levels)));
      const __m512i high = _mm512_srli_epi32(packed, 4);
      _mm512_storeu_ps(out + 16, _mm512_mul_ps(d, _mm512_permutexvar_ps(high, levels)));
    }
  }
};
template <>
struct FastDecode<Avx512, blocks::Q4_0> : Decode18<blocks::Q4_0> {};
template <>
struct FastDecode<Avx512, blocks::IQ4_NL> : Decode18<blocks::IQ4_NL> {};

template <>
struct FastDecode<Avx512, blocks::Q8_0> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    for (const float* end = out + k; out < end; out += 32, p += 34) {
      const __m512 d = Avx512::half(p);
      const auto* codes = reinterpret_cast<const int8_t*>(p + 2);
      _mm512_storeu_ps(out, _mm512_mul_ps(d, Avx512::load_bytes(codes)));
      _mm512_storeu_ps(out + 16, _mm512_mul_ps(d, Avx512::load_bytes(codes + 16)));
    }
  }
};

// Two vectors of levels of a block of 32.
template <class T>
struct Levels32 {
  static constexpr int64_t kBytes = sizeof(T);
  static void two(const uint8_t* block, __m512 table, __m512* to) {
    const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(block + 2));
    to[0] = _mm512_permutexvar_ps(packed, table);
    to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), table);
  }
  static __m512 table() { return DecodeNibbles<T>::levels(); }
};
template <>
struct Levels32<blocks::Q8_0> {
  static constexpr int64_t kBytes = sizeof(blocks::Q8_0);
  static void two(const uint8_t* block, __m512, __m512* to) {
    const auto* codes = reinterpret_cast<const int8_t*>(block + 2);
    to[0] = Avx512::load_bytes(codes);
    to[1] = Avx512::load_bytes(codes + 16);
  }
  static __m512 table() { return _mm512_setzero_ps(); }
};

template <class T>
struct FoldOneScale {
  using Levels = Levels32<T>;
  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    const int64_t lines = (16 * Levels::kBytes + 63) / 64;  // of 16 blocks
    const __m512 table = Levels::table();
    FoldedScales<Avx512, T> scaled;
    for (int64_t at = 0; at < k / 32; at++, out += 32, rows += Levels::kBytes) {
      const int64_t b = at % scaled.kBlocks;
      if (b == 0) scaled.take(rows, row_bytes, k / 32 - at, x);
      for (int64_t line = 0; line < lines; line++, next += 64) Avx512::prefetch(next);
      __m512 sum[2][2] = {{_mm512_loadu_ps(out), _mm512_loadu_ps(out + 16)},
                          {_mm512_setzero_ps(), _mm512_setzero_ps()}};
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; j++) {
        const uint8_t* block = rows + j * row_bytes;
        __m512 levels[2];
        Levels::two(block, table, levels);
        const __m512 factor = _mm512_set1_ps(scaled.scales[b][j]);
        for (int v = 0; v < 2; v++) sum[j % 2][v] = _mm512_fmadd_ps(factor, levels[v], sum[j % 2][v]);
      }
      for (int v = 0; v < 2; v++) _mm512_storeu_ps(out + 16 * v, _mm512_add_ps(sum[0][v], sum[1][v]));
    }
  }
};
template <>
struct FastFold<Avx512, blocks::Q4_0> : FoldOneScale<blocks::Q4_0> {};
template <>
struct FastFold<Avx512, blocks::IQ4_NL> : FoldOneScale<blocks::IQ4_NL> {};
template <>
struct FastFold<Avx512, blocks::Q8_0> : FoldOneScale<blocks::Q8_0> {};

template <>
struct FastDecode<Avx512, blocks::Q4_K> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (const float* end = out + k; out < end; p += sizeof(blocks::Q4_K)) {
      alignas(64) float both[16];
      _mm512_store_ps(both, Halves<blocks::Q4_K>::both(p));
      for (int pair = 0; pair < 4; pair++, out += 64) {
        for (int half = 0; half < 2; half++) {
          const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(p + 16 + 32 * pair + 16 * half));
          const auto value = [&](__m512i codes, int run) {  // scale * code is exact
            return _mm512_fmsub_ps(_mm512_set1_ps(both[run]), _mm512_permutexvar_ps(codes, levels),
                                   _mm512_set1_ps(both[8 + run]));
          };
          _mm512_storeu_ps(out + 16 * half, value(packed, 2 * pair));
          _mm512_storeu_ps(out + 32 + 16 * half, value(_mm512_srli_epi32(packed, 4), 2 * pair + 1));
        }
      }
    }
  }
};

// The minimums of a run, times x, are one number for its 32 columns.
template <>
struct FastFold<Avx512, blocks::Q4_K> {
  static constexpr int64_t kBytes = sizeof(blocks::Q4_K), kRows = 16;

  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    constexpr int64_t kQuarter = kRows * kBytes / 4;  // of 16 blocks: nine lines, for two runs
    for (const float* end = out + k; out < end; rows += kBytes) {
      alignas(64) float scaled[kRows][16], totals[16];  // of 8 scales and 8 minimums
      __m512 total = _mm512_setzero_ps();
      for (int64_t j = 0; j < kRows; j++) {
        const __m512 both =
            _mm512_mul_ps(Halves<blocks::Q4_K>::both(rows + j * row_bytes), _mm512_set1_ps(x[j]));
        _mm512_store_ps(scaled[j], both);
        total = _mm512_add_ps(total, both);
      }
      _mm512_store_ps(totals, total);
      for (int pair = 0; pair < 4; pair++, out += 64, next += kQuarter) {
        for (int64_t at = 0; at < kQuarter; at += 64) Avx512::prefetch(next + at);
        __m512 sum[2][2][2];
#pragma GCC unroll 2
        for (int run = 0; run < 2; run++) {
          const __m512 least = _mm512_set1_ps(totals[8 + 2 * pair + run]);
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            sum[0][run][half] = _mm512_sub_ps(_mm512_loadu_ps(out + 32 * run + 16 * half), least);
            sum[1][run][half] = _mm512_setzero_ps();
          }
        }
#pragma GCC unroll 16
        for (int64_t j = 0; j < kRows; j++) {
          const uint8_t* codes = rows + j * row_bytes + 16 + 32 * pair;
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            const __m512i packed = _mm512_cvtepu8_epi32(Avx512::load16(codes + 16 * half));
#pragma GCC unroll 2
            for (int run = 0; run < 2; run++) {
              const __m512i nibbles = run == 0 ? packed : _mm512_srli_epi32(packed, 4);
              sum[j % 2][run][half] =
                  _mm512_fmadd_ps(_mm512_set1_ps(scaled[j][2 * pair + run]),
                                  _mm512_permutexvar_ps(nibbles, levels), sum[j % 2][run][half]);
            }
          }
        }
#pragma GCC unroll 2
        for (int run = 0; run < 2; run++) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            _mm512_storeu_ps(out + 32 * run + 16 * half, _mm512_add_ps(sum[0][run][half], sum[1][run][half]));
          }
        }
      }
    }
  }
};

template <>
struct FastDecode<Avx512, F16Numbers> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) _mm512_storeu_ps(out + i, Avx512::load_half(p + 2 * i));
    for (; i < k; i++) out[i] = blocks::half_at(p + 2 * i);
  }
};
template <>
struct FastDecode<Avx512, Bf16Numbers> {
  static void row(const uint8_t* p, int64_t k, float* out) {
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * i));
      _mm512_storeu_ps(out + i, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
    }
    for (; i < k; i++) out[i] = blocks::as_float(static_cast<uint32_t>(blocks::load16(p + 2 * i)) << 16);
  }
};

}  // namespace
}  // namespace kvfold
