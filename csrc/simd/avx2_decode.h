// Rows to float32, and 16 rows folded by columns (kernels/latent_kernels.h): levels in 256-bit vectors, their
// arithmetic in those of a set S.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels/quant_formats.h"
#include "simd/avx2_codes.h"

namespace kvfold {
namespace {

// A scale times a level is exact, so a weight with a minimum is rounded once, as in decode_blocks.h.
template <class S, class T>
struct Decode32 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    for (const float* end = out + k; out < end; out += 32, p += sizeof(T)) {
      alignas(32) int8_t block[32];
      Avx2::store_codes(block, on_top_of_levels<T>(0, Codes32<T>::codes(p)));
      const auto scale = S::set(block_scale(p));
      for (int i = 0; i < 32; i += S::kLanes) {
        const auto level = S::load_bytes(block + i);
        if constexpr (Parts<T>::kHasMin) {
          S::store(out + i, S::fma(scale, level, S::set(block_scale(p + 2))));
        } else {
          S::store(out + i, S::mul(scale, level));
        }
      }
    }
  }
};

template <class S, class T>
struct Decode256 {
  static void row(const uint8_t* p, int64_t k, float* out) {
    constexpr int kRun = Parts<T>::kRun, kRuns = 256 / kRun;
    for (const float* end = out + k; out < end; p += sizeof(T)) {
      alignas(32) float scales[kRuns], minimums[kRuns];
      alignas(32) int8_t block[kRuns][kRun];
      take_scales<T>(p, scales, minimums);
      __m256i vectors[8];
      Codes256<T>::codes(p, vectors);
      for (int i = 0; i < 8; i++) {
        Avx2::store_codes(block[0] + 32 * i, on_top_of_levels<T>(0, vectors[i]));
      }
      for (int run = 0; run < kRuns; run++) {
        const auto scale = S::set(scales[run]);
        for (int i = 0; i < kRun; i += S::kLanes, out += S::kLanes) {
          const auto level = S::load_bytes(block[run] + i);
          if constexpr (Parts<T>::kHasMin) {
            S::store(out, S::fma(scale, level, S::set(-minimums[run])));
          } else {
            S::store(out, S::mul(scale, level));
          }
        }
      }
    }
  }
};

template <class T>
struct FastDecode<Avx2, T> : ByCodes<T, Decode32<Avx2, T>, Decode256<Avx2, T>, NoDecode> {};

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
template <class S, int run>
inline void fold_levels(const int8_t (*rows)[32], const float* factors, int stride,
                        const typename S::Floats (&start)[32 / run], float* out) {
  constexpr int kLanes = S::kLanes, kVectors = 32 / kLanes;
  static_assert(run % kLanes == 0);
  typename S::Floats sum[2][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    sum[0][v] = S::load(out + kLanes * v), sum[1][v] = start[kLanes * v / run];
  }
#pragma GCC unroll 16
  for (int j = 0; j < kFoldedRows; j++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const auto factor = S::set(factors[j * stride + kLanes * v / run]);
      sum[j % 2][v] = S::fma(factor, S::load_bytes(rows[j] + kLanes * v), sum[j % 2][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) S::store(out + kLanes * v, S::add(sum[0][v], sum[1][v]));
}

// Scales of some blocks of 32 of all rows times x, and what their minimums add, before any block is folded: a
// vector of what was just stored in pieces waits until it is in the cache, and where it is not stored, GCC
// puts it together by two instructions a scale (a head of IQ4_NL 5.4 instead of 4.5 us on Zen 3).
template <class S, class T>
struct FoldedScales {
  static constexpr int64_t kBlocks = 16;
  static constexpr int kFields = Parts<T>::kHasMin ? 2 : 1;
  alignas(64) float scales[kBlocks][kFoldedRows];
  float least[kBlocks];

  void take(const uint8_t* rows, int64_t row_bytes, int64_t num_blocks, const float* x) {
    alignas(32) uint16_t halves[kFields][kBlocks][kFoldedRows];
    const int64_t count = std::min(kBlocks, num_blocks);
    for (int64_t j = 0; j < kFoldedRows; j++) {
      for (int64_t b = 0; b < count; b++) {
        for (int field = 0; field < kFields; field++) {
          halves[field][b][j] = blocks::load16(rows + j * row_bytes + b * sizeof(T) + 2 * field);
        }
      }
    }
    for (int64_t b = 0; b < count; b++) {
      auto sum = S::zero();
      for (int j = 0; j < kFoldedRows; j += S::kLanes) {
        const auto times_x = [&](const uint16_t* of) {
          return S::mul(S::load_half(reinterpret_cast<const uint8_t*>(of + j)), S::load(x + j));
        };
        S::store(scales[b] + j, times_x(halves[0][b]));
        if constexpr (kFields == 2) sum = S::add(sum, times_x(halves[1][b]));
      }
      least[b] = kFields == 2 ? S::sum(sum) : 0.0f;
    }
  }
};

template <class S, class T>
struct Fold32 {
  static constexpr int64_t kBytes = sizeof(T);

  static void rows(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                   const uint8_t* next) {
    constexpr int64_t kLines = (kFoldedRows * kBytes + 63) / 64;  // of 16 blocks
    FoldedScales<S, T> scaled;
    for (int64_t at = 0; at < k / 32; at++, out += 32, rows += kBytes) {
      const int64_t b = at % scaled.kBlocks;
      if (b == 0) scaled.take(rows, row_bytes, k / 32 - at, x);
      for (int64_t line = 0; line < kLines; line++, next += 64) S::prefetch(next);
      alignas(32) int8_t block[kFoldedRows][32];
#pragma GCC unroll 16
      for (int j = 0; j < kFoldedRows; j++) {
        Avx2::store_codes(block[j], on_top_of_levels<T>(0, Codes32<T>::codes(rows + j * row_bytes)));
      }
      const typename S::Floats start[1] = {S::set(scaled.least[b])};
      fold_levels<S, 32>(block, scaled.scales[b], 1, start, out);
    }
  }
};

template <class S, class T>
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
        for (int i = 0; i < 8; i++) Avx2::store_codes(block[i][j], on_top_of_levels<T>(0, vectors[i]));
      }
      for (int run = 0; run < kRuns; run += 8) Avx2::store(least + run, sum_of_least[run / 8]);
      for (int i = 0; i < 8; i++, out += 32) {
        if (i % 2 == 0) {
          Avx2::prefetch_all<kQuarter>(next, 0);
          next += kQuarter;
        }
        typename S::Floats start[32 / kRun];
        for (int run = 0; run < 32 / kRun; run++) start[run] = S::set(least[32 / kRun * i + run]);
        fold_levels<S, kRun>(block[i], scaled[0] + 32 / kRun * i, kRuns, start, out);
      }
    }
  }
};

template <class T>
struct FastFold<Avx2, T> : ByCodes<T, Fold32<Avx2, T>, Fold256<Avx2, T>, NoFold> {};

}  // namespace
}  // namespace kvfold
