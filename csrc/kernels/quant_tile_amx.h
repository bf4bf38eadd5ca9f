// Tiles of prompts where a processor multiplies whole tiles: 16 rows of activations by 16 of weights.
//
// A panel is as in quant_tile.h, two vectors wide and with signed levels: the codes of a vector are a tile of
// weights as they lie. Activations come in groups of 16 rows with a record for each 32 columns: codes
// [16 rows][32], scales [16], and sums for minimums [16] where the type has them.
//
// Scales change every 32 columns, so a tile multiplies those, half of what it could, and its sums go through
// memory to the vectors, which turn them into float32, scale and add them: 48 instructions for 8192
// multiply-adds. Dots of vectors are 128 more instructions of the same ports. Types of two scales for 32
// columns have twice the tiles and stay with vectors: docs/notes/cpu-kernels.md.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/quant_tile.h"

namespace kvfold {
namespace {

template <class S, bool has_min>
struct ScaledTile {
  using Panels = AnyTile<S, Shape<kBlock, false, has_min, true>, 1>;
  static constexpr int kVectors = 2, kCols = S::kTileRows, kRows = Panels::kRows;
  static_assert(kRows == kVectors * S::kLanes);

  static constexpr int64_t kScales = kBlock * kCols, kSums = kScales + 4 * kCols;
  static constexpr int64_t kGroup = kSums + (has_min ? 4 * kCols : 0);
  static int64_t group_bytes(int64_t k) { return k / kBlock * kGroup; }

  static void prepare(const float* x, int64_t ldx, const int32_t* pick, int64_t rows, int64_t k,
                      uint8_t* prepared) {
    for (int64_t first = 0; first < rows; first += kCols, prepared += group_bytes(k)) {
      for (int64_t c = 0; c < kCols; c++) {
        uint8_t* record = prepared;
        const bool empty = first + c >= rows;  // zeros, which are multiplied too
        const float* row = empty ? nullptr : x + (pick ? pick[first + c] : first + c) * ldx;
        for (int64_t at = 0; at < k; at += kBlock, record += kGroup) {
          int32_t halves[2] = {};
          float scale = 0.0f;
          auto* codes = reinterpret_cast<int8_t*>(record + kBlock * c);
          if (empty) {
            std::memset(codes, 0, kBlock);
          } else {
            scale = S::quantize(row + at, codes, halves);
          }
          std::memcpy(record + kScales + 4 * c, &scale, 4);
          const float sum = scale * static_cast<float>(halves[0] + halves[1]);
          if (has_min) std::memcpy(record + kSums + 4 * c, &sum, 4);
        }
      }
    }
  }

  // Sums of 32 columns.
  using Sums = int32_t[kCols][S::kLanes];

  // Multiplies blocks one after the other: those of a group of x by a vector of the panel, then by the other
  // one, then the next group.
  struct Multiplier {
    const uint8_t *panel, *x;
    int64_t blocks, group_bytes, vectors, groups;
    int64_t vector = 0;
    const uint8_t *codes = x, *weights = panel;  // of the next block, of so many left of this vector
    int64_t left = blocks;

    void next(Sums& sums) {
      if (groups == 0) return;
      constexpr int64_t stride = kVectors * S::kLanes * 4;
      S::template zero_tile<0>();
      S::template load_tile<4>(codes, kBlock);
      S::template load_tile<6>(weights, stride);
      S::template dot_tiles<0, 4, 6>();
      S::template store_tile<0>(sums);
      codes += kGroup;
      weights += Panels::kRecord;
      if (--left > 0) return;
      left = blocks;
      if (++vector == vectors) {
        vector = 0;
        groups--;
        x += group_bytes;
      }
      codes = x;
      weights = panel + vector * S::kLanes * 4;
    }
  };

  template <int cols>
  static void add_block(const Sums& sums, const float* scales, const float* x_scales,
                        typename S::Floats (&out)[cols]) {
    const auto scale = S::load(scales);
    KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
      const auto sum = S::to_floats(S::load_codes(sums[c]));
      out[c] = S::fma(sum, S::mul(scale, S::set(x_scales[c])), out[c]);
    }
    if constexpr (has_min) {
      const auto minimum = S::load(scales + kRows);
      const float* x_sums = x_scales + kCols;
      KVFOLD_UNROLLED for (int c = 0; c < cols; c++) out[c] = S::fma(minimum, S::set(x_sums[c]), out[c]);
    }
  }

  // Groups of `rows` rows: all of kCols, or one of fewer, whose sums of `cols` are added. Tiles of fewer rows
  // would not be faster.
  template <int cols, class Rows>
  static void multiply(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, int64_t group_bytes,
                       int64_t groups, Rows rows, const float* start, int64_t ld_start, float* y,
                       int64_t ldy) {
    alignas(64) Sums sums[2];  // of the block that is added and of the one that is multiplied meanwhile
    const int64_t vectors = (n + S::kLanes - 1) / S::kLanes, blocks = k / kBlock;
    Multiplier multiplier{panel, x, blocks, group_bytes, vectors, groups};
    multiplier.next(sums[0]);
    int64_t turn = 0;
    for (int64_t g = 0; g < groups; g++, x += group_bytes, y += kCols * ldy) {
      for (int64_t v = 0; v < vectors; v++) {
        const int64_t at = v * S::kLanes, lanes = std::min<int64_t>(n - at, S::kLanes);
        typename S::Floats out[cols];
        KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
          out[c] =
              start == nullptr || c >= rows ? S::zero() : S::load_first(start + c * ld_start + at, lanes);
        }
        const auto* scales = reinterpret_cast<const float*>(panel + Panels::kCodeBytes) + at;
        const auto* x_scales = reinterpret_cast<const float*>(x + kScales);
        for (int64_t block = 0; block < blocks; block++, turn++) {
          multiplier.next(sums[(turn + 1) % 2]);
          add_block<cols>(sums[turn % 2], scales, x_scales, out);
          scales += Panels::kRecord / 4;
          x_scales += kGroup / 4;
        }
        KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
          if (c < rows) S::store_first(y + c * ldy + at, out[c], lanes);
        }
      }
      if (start != nullptr) start += kCols * ld_start;
    }
  }

  static void tile(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, int64_t group_bytes,
                   int64_t rows, const float* start, int64_t ld_start, float* y, int64_t ldy,
                   const uint8_t* next, int64_t next_bytes) {
    for (int64_t i = 0; i < next_bytes; i += 64) S::prefetch(next + i);
    static constexpr auto kShapes = S::code_shapes(kBlock);
    S::configure(kShapes);
    const int64_t groups = rows / kCols, done = groups * kCols, rest = rows - done;
    if (groups > 0) {
      using All = std::integral_constant<int64_t, kCols>;
      multiply<kCols>(panel, n, k, x, group_bytes, groups, All(), start, ld_start, y, ldy);
    }
    if (rest > 0) {
      constexpr int kQuarter = kCols / 4;
      const float* from = start == nullptr ? nullptr : start + done * ld_start;
      with_count<4>((rest + kQuarter - 1) / kQuarter, [&](auto quarters) {
        multiply<decltype(quarters)::value * kQuarter>(panel, n, k, x + groups * group_bytes, group_bytes, 1,
                                                       rest, from, ld_start, y + done * ldy, ldy);
      });
    }
    S::release();
  }
};

// Those of a type, in place of what `kernels` has.
template <class S, class T>
void take_scaled_tiles(MatrixKernels& kernels) {
  using Tile = ScaledTile<S, Parts<T>::kHasMin>;
  static_assert(Parts<T>::kRun == kBlock && MatrixKernels::kFewRows % Tile::kCols == 0);
  kernels.tile_rows = Tile::kRows;
  kernels.tile_cols = Tile::kCols;
  kernels.tile_bytes = Tile::group_bytes;
  kernels.prepare_tile = Tile::prepare;
  kernels.panel_columns = Tile::Panels::kPanelColumns;
  kernels.panel_bytes = Tile::Panels::panel_bytes;
  kernels.unpack = [](const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, uint8_t* panel) {
    if constexpr (Fast<S, T>::kUnpack) {
      if (n == Tile::kRows) return Fast<S, T>::unpack(raw, row_bytes, k, panel);
    }
    Tile::Panels::unpack(best_take_apart<S, T>(), T::elements, sizeof(T), 0, raw, row_bytes, n, k, panel);
  };
  kernels.tile = Tile::tile;
}

}  // namespace
}  // namespace kvfold
