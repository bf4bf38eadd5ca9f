// What every form of pair_kernels.h has in common: panels that are turned while they are packed, and the
// maximum of the softmax. Included by pair_tile.h and pair_tile_amx.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/pair_kernels.h"

namespace kvfold {
namespace {

template <class S>
struct PairPanels {
  static constexpr int64_t kBlockWords = pairs_of(kBlockKeys);

  static int64_t seen_by(int64_t row, int64_t seen, int64_t keys) {
    return std::clamp<int64_t>(seen + row, 0, keys);
  }
  // Scores after the n-th that share its vector weigh nothing.
  static void hide_rest(float* scores, int64_t n) {
    for (; n % S::kLanes != 0; n++) scores[n] = -std::numeric_limits<float>::infinity();
  }

  static void raise(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys,
                    float scale_log2e, Softmax* states, float* values, int64_t width) {
    for (int64_t i = 0; i < rows; i++) {
      const int64_t n = seen_by(i, seen, keys);
      if (n == 0) continue;
      float* row = scores + i * stride;
      hide_rest(row, n);
      auto most = S::load(row);
      for (int64_t j = S::kLanes; j < n; j += S::kLanes) most = S::max(S::load(row + j), most);
      const float exponent = std::ceil(S::largest(most) * scale_log2e);
      Softmax& state = states[i];
      if (exponent <= state.exponent) continue;
      if (state.sum != 0.0f) {
        const float shrink = std::exp2(state.exponent - exponent);
        const auto factor = S::set(shrink);
        state.sum *= shrink;
        for (int64_t c = 0; c < width; c += S::kLanes) {
          float* at = values + i * width + c;
          S::store(at, S::mul(S::load(at), factor));
        }
      }
      state.exponent = exponent;
    }
  }

  static void widen_f16(const uint8_t* halves, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + S::kLanes <= n; i += S::kLanes) S::store(to + i, S::load_half(halves + 2 * i));
    if (i == n) return;
    uint8_t last[2 * S::kLanes] = {};
    std::memcpy(last, halves + 2 * i, 2 * (n - i));
    S::store_first(to + i, S::load_half(last), n - i);
  }

  static constexpr int64_t kChunk = 32;  // numbers rounded at a time

  // `count` vectors of numbers to words [pairs of dim][width]: rounded where they lie, by round(vector, first
  // number, count, to), and turned four words at a time. Vectors of lanes may be longer than a group is wide,
  // or not divide it: each overwrites what the one before had too much, and the last is stored in part.
  template <int64_t width, class Round>
  static void turn(int64_t count, int64_t dim, uint32_t* to, const Round& round) {
    constexpr int64_t kLines = (width + S::kLanes - 1) / S::kLanes * S::kLanes;
    alignas(64) uint16_t numbers[kLines][kChunk];
    std::memset(numbers, 0, sizeof numbers);
    for (int64_t at = 0; at < dim; at += kChunk) {
      const int64_t n = std::min(kChunk, dim - at), words = pairs_of(n);
      for (int64_t i = 0; i < count; i++) {
        if (n < kChunk) numbers[i][n] = 0;  // beside the last number of an odd dimension
        round(i, at, n, numbers[i]);
      }
      for (int64_t p = 0; p < words; p += 4) {
        typename S::Ints four[kLines / S::kLanes][4];
        for (int64_t lane = 0; lane < kLines; lane += S::kLanes) {
          S::transpose(reinterpret_cast<const uint8_t*>(numbers[lane] + 2 * p), kChunk * sizeof(uint16_t),
                       four[lane / S::kLanes]);
        }
        for (int64_t j = 0; j < std::min<int64_t>(4, words - p); j++, to += width) {
          const bool is_last = at + 2 * (p + j + 1) >= dim;
          for (int64_t lane = 0; lane < width; lane += S::kLanes) {
            const auto& vector = four[lane / S::kLanes][j];
            if (is_last && lane + S::kLanes > width) {
              std::memcpy(to + lane, &vector, (width - lane) * 4);
            } else {
              S::store_codes(to + lane, vector);
            }
          }
        }
      }
    }
  }

  // Pairs of rows of x to words [pairs of rows][kPanelLanes], by pair(row, vector of the even one, of the odd
  // one); what is missing of rows and columns is zeros.
  template <class Pair>
  static void interleave(const float* x, int64_t stride, int64_t rows, int64_t columns, uint32_t* to,
                         const Pair& pair) {
    alignas(64) float filled[2][kPanelLanes] = {};
    for (int64_t row = 0; row < rows; row += 2, to += kPanelLanes) {
      const float* from[2] = {x + row * stride, x + (row + 1) * stride};
      if (row + 2 > rows || columns < kPanelLanes) {
        for (int64_t i = 0; i < 2; i++) {
          if (row + i < rows) {
            std::memcpy(filled[i], from[i], columns * 4);
          } else {
            std::memset(filled[i], 0, columns * 4);
          }
          from[i] = filled[i];
        }
      }
      for (int64_t c = 0; c < kPanelLanes; c += S::kLanes) {
        S::store_codes(to + c, pair(row, c, S::load(from[0] + c), S::load(from[1] + c)));
      }
    }
  }
};

}  // namespace
}  // namespace kvfold
