// The same two forms for weights that are plain numbers: float32 and float16 against float32, bfloat16 in
// pairs against bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/quant_tile.h"

namespace kvfold {
namespace {

struct F32Weights {
  static constexpr int kId = 0, kBytes = 4;
  static constexpr bool kPairs = false;
};
struct F16Weights {
  static constexpr int kId = 1, kBytes = 2;
  static constexpr bool kPairs = false;
};
struct Bf16Weights {
  static constexpr int kId = 30, kBytes = 2;
  static constexpr bool kPairs = true;  // two columns in a 32-bit lane
};

template <class S, class T>
struct FloatMatrix {
  static constexpr int kVectors = S::kTileVectors, kCols = S::kTileCols, kRows = kVectors * S::kLanes;
  static constexpr int kStep = T::kPairs ? 2 : 1;  // columns of a 32-bit lane

  static int64_t lanes(int64_t k) { return (k + kStep - 1) / kStep; }

  // x as lanes: float32, or two bfloat16 of which the last may be zero.
  static void to_lanes(const float* x, int64_t k, uint8_t* out) {
    if constexpr (T::kPairs) {
      auto* halves = reinterpret_cast<uint16_t*>(out);
      S::to_bf16(x, halves, k);
      if (k % 2 != 0) halves[k] = 0;
    } else {
      std::memcpy(out, x, k * 4);
    }
  }

  static int64_t dot_bytes(int64_t k) { return (lanes(k) * 4 + 63) / 64 * 64; }
  static void prepare_dot(const float* x, int64_t k, uint8_t* prepared) {
    std::memset(prepared, 0, dot_bytes(k));
    to_lanes(x, k, prepared);
  }

  // The next kLanes lanes of a weight row times those of x.
  static typename S::Floats product(const uint8_t* w, const uint8_t* x, typename S::Floats sum) {
    if constexpr (T::kPairs) {
      return S::dot_bf16(sum, S::load_codes(w), S::load_codes(x));
    } else if constexpr (T::kBytes == 2) {
      return S::fma(S::load_half(w), S::load(reinterpret_cast<const float*>(x)), sum);
    } else {
      return S::fma(S::load(reinterpret_cast<const float*>(w)), S::load(reinterpret_cast<const float*>(x)),
                    sum);
    }
  }

  template <int rows>
  static void dots(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, const uint8_t* x, float* y,
                   int64_t ldy, const RowsAfter& after) {
    constexpr int kChains = rows == 1 ? 4 : 2;  // independent sums of a row: an addition takes four cycles
    constexpr int kBytes = S::kLanes * kStep * T::kBytes;
    const int64_t stride = dot_bytes(k), whole = k / (S::kLanes * kStep);
    ReadAhead read_ahead(raw, row_bytes, n, kPrefetch, after);
    for (int64_t i = 0; i < n; i++) {
      const int64_t ahead = read_ahead.of(i);
      const uint8_t* w = raw + i * row_bytes;
      typename S::Floats sum[rows][kChains];
      for (auto& chains : sum) {
        for (auto& s : chains) s = S::zero();
      }
      int64_t at = 0;
      for (; at + kChains <= whole; at += kChains) {
        S::prefetch(w + at * kBytes + ahead);
        if (kBytes * kChains > 64) S::prefetch(w + at * kBytes + ahead + 64);
        if (kBytes * kChains > 128) {
          S::prefetch(w + at * kBytes + ahead + 128);
          S::prefetch(w + at * kBytes + ahead + 192);
        }
        KVFOLD_UNROLLED for (int c = 0; c < kChains; c++) {
          KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
            sum[r][c] = product(w + (at + c) * kBytes, x + r * stride + (at + c) * S::kLanes * 4, sum[r][c]);
          }
        }
      }
      for (; at < whole; at++) {
        for (int r = 0; r < rows; r++) {
          sum[r][0] = product(w + at * kBytes, x + r * stride + at * S::kLanes * 4, sum[r][0]);
        }
      }
      if (whole * S::kLanes * kStep < k) {
        alignas(64) uint8_t rest[kBytes] = {};
        std::memcpy(rest, w + whole * kBytes, (k - whole * S::kLanes * kStep) * T::kBytes);
        for (int r = 0; r < rows; r++)
          sum[r][0] = product(rest, x + r * stride + whole * S::kLanes * 4, sum[r][0]);
      }
      for (int r = 0; r < rows; r++) {
        for (int c = 1; c < kChains; c++) sum[r][0] = S::add(sum[r][0], sum[r][c]);
        y[r * ldy + i] = S::sum(sum[r][0]);
      }
    }
  }
  static constexpr int64_t kPrefetch = 8192;

  static void dot(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, const uint8_t* x, int64_t rows,
                  float* y, int64_t ldy, const RowsAfter& after) {
    with_count<MatrixKernels::kMaxDotRows>(
        rows, [&](auto count) { dots<decltype(count)::value>(raw, row_bytes, n, k, x, y, ldy, after); });
  }

  // Panels [lanes of k][vectors][lanes], groups of x [lanes of k][columns].
  static int64_t group_bytes(int64_t k) { return lanes(k) * kCols * 4; }
  static constexpr int32_t kPanelColumns = columns_of_panel(256 / kStep * kRows * 4);
  static int64_t panel_bytes(int64_t k) { return (lanes(k) + 3) / 4 * 4 * kRows * 4; }

  static void prepare_tile(const float* x, int64_t ldx, const int32_t* pick, int64_t rows, int64_t k,
                           uint8_t* prepared) {
    for (int64_t first = 0; first < rows; first += kCols, prepared += group_bytes(k)) {
      for (int64_t c = 0; c < std::min<int64_t>(kCols, rows - first); c++) {
        const float* row = x + (pick ? pick[first + c] : first + c) * ldx;
        auto* to = reinterpret_cast<uint32_t*>(prepared) + c;
        for (int64_t at = 0; at < k; at += 64) {
          uint32_t chunk[64];
          const int64_t count = std::min<int64_t>(64, k - at);
          to_lanes(row + at, count, reinterpret_cast<uint8_t*>(chunk));
          for (int64_t i = 0; i < lanes(count); i++, to += kCols) *to = chunk[i];
        }
      }
    }
  }

  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, uint8_t* panel) {
    constexpr int kChunk = 16 * kStep;  // columns in 64 bytes of a panel row
    for (int64_t at = 0; at < k; at += kChunk) {
      alignas(64) uint8_t chunk[kRows][64] = {};
      const int64_t count = std::min<int64_t>(kChunk, k - at);
      for (int64_t i = 0; i < n; i++) {
        const uint8_t* from = raw + i * row_bytes + at * T::kBytes;
        if constexpr (!T::kPairs && T::kBytes == 2) {
          float wide[kChunk];
          for (int64_t j = 0; j < count; j++) wide[j] = blocks::half_at(from + 2 * j);
          std::memcpy(chunk[i], wide, count * 4);
        } else {
          std::memcpy(chunk[i], from, count * T::kBytes);
        }
      }
      for (int64_t piece = 0; piece < (lanes(count) + 3) / 4; piece++, panel += 16 * kRows) {
        for (int v = 0; v < kVectors; v++) {
          typename S::Ints columns[4];
          S::transpose(chunk[v * S::kLanes] + 16 * piece, 64, columns);
          for (int j = 0; j < 4; j++) S::store_codes(panel + (j * kVectors + v) * S::kLanes * 4, columns[j]);
        }
      }
    }
  }

  template <int cols>
  static void group(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, const float* start,
                    int64_t ld_start, float* y, int64_t ldy) {
    typename S::Floats out[kVectors][cols], before[kVectors][cols];
    load_tile<S, kVectors, cols>(nullptr, 0, n, out);
    for (int64_t i = 0; i < lanes(k); i++, panel += kRows * 4, x += kCols * 4) {
      KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
        KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
          const uint8_t* w = panel + v * S::kLanes * 4;
          if constexpr (T::kPairs) {
            out[v][c] = S::dot_bf16(out[v][c], S::load_codes(w), S::four_codes(x + 4 * c));
          } else {
            const auto* values = reinterpret_cast<const float*>(x);
            out[v][c] = S::fma(S::load(reinterpret_cast<const float*>(w)), S::set(values[c]), out[v][c]);
          }
        }
      }
    }
    // A panel's sums by themselves, then added: one chain over 10752 columns was 1.4e-5 of a row off.
    load_tile<S, kVectors, cols>(start, ld_start, n, before);
    KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
      KVFOLD_UNROLLED for (int c = 0; c < cols; c++) out[v][c] = S::add(out[v][c], before[v][c]);
    }
    store_tile<S, kVectors, cols>(out, n, y, ldy);
  }

  static void tile(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, int64_t group_bytes,
                   int64_t rows, const float* start, int64_t ld_start, float* y, int64_t ldy,
                   const uint8_t* next, int64_t next_bytes) {
    for_groups<S, kCols>(x, group_bytes, rows, start, ld_start, y, ldy, next, next_bytes,
                         [&](auto cols, const uint8_t* group_x, const float* from, float* to) {
                           group<decltype(cols)::value>(panel, n, k, group_x, from, ld_start, to, ldy);
                         });
  }
};

}  // namespace
}  // namespace kvfold
