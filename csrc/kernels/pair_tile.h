// The algorithms of pair_kernels.h once, over the vocabulary of an instruction set. Included last by
// isa/pairs_*.cpp.
//
// Both products are one loop: words of up to S::kPairRows rows, each into every lane, times
// S::kPairVectors vectors of a panel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/exp2.h"
#include "kernels/pair_kernels.h"

#define KVFOLD_UNROLLED_PAIRS _Pragma("GCC unroll 16")

namespace kvfold {
namespace {

template <class S>
struct PairTile {
  using Floats = typename S::Floats;
  using Number = typename S::Number;
  static constexpr int64_t kNumbers = 4 / sizeof(Number);  // of a word
  static constexpr int64_t kBlockWords = kBlockKeys / kNumbers;
  static constexpr int64_t kGroupRows = 12;
  static constexpr PairWords kWords{kNumbers, S::kPairStep, kGroupRows};
  static constexpr int kVectors = S::kPairVectors, kRows = S::kPairRows;
  static constexpr int kParts = kPanelLanes / (kVectors * S::kLanes);  // of a panel
  static_assert(kGroupRows % kRows == 0 && kParts * kVectors * S::kLanes == kPanelLanes);

  // sum[v][r] += rows [r * row_step + i * step] times panel [i * kPanelLanes + v * kLanes], i < num_words.
  template <int row_step, int step, int rows>
  static void multiply(const uint32_t* a, const uint32_t* panel, int64_t num_words,
                       Floats (&sum)[kVectors][rows]) {
    for (int64_t i = 0; i < num_words; i++, a += step, panel += kPanelLanes) {
      typename S::Ints w[kVectors];
      KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) w[v] = S::load_codes(panel + v * S::kLanes);
      KVFOLD_UNROLLED_PAIRS for (int r = 0; r < rows; r++) {
        const auto x = S::four_codes(a + r * row_step);
        KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) sum[v][r] =
            S::add_products(sum[v][r], w[v], x);
      }
    }
  }

  // use(first row, integral_constant of rows) for the rows of a group, kRows at a time.
  template <class Use>
  static void for_rows(int64_t rows, const Use& use) {
    for (int64_t first = 0; first < rows; first += kRows) use_count<kRows>(first, rows - first, use);
  }
  template <int most, class Use>
  static void use_count(int64_t first, int64_t count, const Use& use) {
    if (count >= most) {
      use(first, std::integral_constant<int, most>{});
    } else if constexpr (most > 1) {
      use_count<most - 1>(first, count, use);
    }
  }

  static void scores(const uint32_t* q, int64_t rows, KeyPanels k, int64_t keys, float* scores,
                     int64_t stride) {
    for (int64_t key = 0; key < keys; key += kPanelLanes) {
      const KeyPanels panel = k.from(key);
      for_rows(rows, [&](int64_t first, auto count) {
        constexpr int n = decltype(count)::value;
        for (int part = 0; part < kParts; part++) {
          const int64_t lane = part * kVectors * S::kLanes;
          Floats sum[kVectors][n];
          KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) {
            KVFOLD_UNROLLED_PAIRS for (int r = 0; r < n; r++) sum[v][r] = S::zero();
          }
          multiply<1, kGroupRows>(q + first, panel.nope + lane, k.nope_words, sum);
          multiply<1, kGroupRows>(q + k.nope_words * kGroupRows + first, panel.rope + lane, k.rope_words,
                                  sum);
          KVFOLD_UNROLLED_PAIRS for (int r = 0; r < n; r++) {
            KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) {
              S::store(scores + (first + r) * stride + key + lane + v * S::kLanes, sum[v][r]);
            }
          }
        }
      });
    }
  }

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

  static void weigh(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys,
                    float scale_log2e, Softmax* states, uint32_t* weights) {
    const auto factor = S::set(scale_log2e);
    const int64_t last = kWords.words_of(seen_by(rows - 1, seen, keys)) * kNumbers;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t n = seen_by(i, seen, keys);
      const uint32_t* words = weights + i * kBlockWords;
      auto* to = reinterpret_cast<Number*>(weights + i * kBlockWords);
      int64_t j = 0;
      if (n > 0) {
        float* row = scores + i * stride;
        hide_rest(row, n);
        const auto minus = S::set(-states[i].exponent);
        for (; j < n; j += S::kLanes) {
          S::store_numbers(to + j, exp2<S>(S::fma(S::load(row + j), factor, minus)));
        }
        for (; j % (kNumbers * S::kLanes) != 0; j++) to[j] = 0;
        auto sum = S::zero();
        for (int64_t at = 0; at < j / kNumbers; at += S::kLanes) {
          sum = S::add_products(sum, S::load_codes(words + at), S::set_ints(S::kOnes));
        }
        states[i].sum += S::sum(sum);
      }
      for (; j < last; j++) to[j] = 0;
    }
  }

  static void add_values(const uint32_t* weights, int64_t rows, int64_t keys, const uint32_t* v,
                         int64_t v_stride, int64_t panels, float* values) {
    const int64_t width = panels * kPanelLanes;
    for (int64_t panel = 0; panel < panels; panel++, v += v_stride, values += kPanelLanes) {
      for_rows(rows, [&](int64_t first, auto count) {
        constexpr int n = decltype(count)::value;
        for (int part = 0; part < kParts; part++) {
          const int64_t lane = part * kVectors * S::kLanes;
          float* out = values + first * width + lane;
          Floats sum[kVectors][n];
          KVFOLD_UNROLLED_PAIRS for (int r = 0; r < n; r++) {
            KVFOLD_UNROLLED_PAIRS for (int c = 0; c < kVectors; c++) {
              sum[c][r] = S::load(out + r * width + c * S::kLanes);
            }
          }
          multiply<kBlockWords, 1>(weights + first * kBlockWords, v + lane, (keys + kNumbers - 1) / kNumbers,
                                   sum);
          KVFOLD_UNROLLED_PAIRS for (int r = 0; r < n; r++) {
            KVFOLD_UNROLLED_PAIRS for (int c = 0; c < kVectors; c++) {
              S::store(out + r * width + c * S::kLanes, sum[c][r]);
            }
          }
        }
      });
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

  // `count` vectors of numbers, `stride` apart, to words [words of dim][width]: rounded where they lie and
  // turned four words at a time. Vectors of lanes may be longer than a group is wide, or not divide it: each
  // overwrites what the one before had too much, and the last is stored in part.
  template <int64_t width>
  static void pack(const float* x, int64_t stride, int64_t count, int64_t dim, uint32_t* to) {
    constexpr int64_t kLines = (width + S::kLanes - 1) / S::kLanes * S::kLanes;
    alignas(64) Number numbers[kLines][kChunk];
    std::memset(numbers, 0, sizeof numbers);
    for (int64_t at = 0; at < dim; at += kChunk) {
      const int64_t n = std::min(kChunk, dim - at), words = (n + kNumbers - 1) / kNumbers;
      for (int64_t i = 0; i < count; i++) {
        if (n < kChunk) numbers[i][n] = 0;  // beside the last number of an odd dimension
        S::to_numbers(x + i * stride + at, numbers[i], n);
      }
      for (int64_t p = 0; p < words; p += 4) {
        typename S::Ints four[kLines / S::kLanes][4];
        for (int64_t lane = 0; lane < kLines; lane += S::kLanes) {
          S::transpose(reinterpret_cast<const uint8_t*>(numbers[lane] + kNumbers * p),
                       kChunk * sizeof(Number), four[lane / S::kLanes]);
        }
        for (int64_t j = 0; j < std::min<int64_t>(4, words - p); j++, to += width) {
          const bool is_last = at + kNumbers * (p + j + 1) >= dim;
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

  static void pack_values(const float* x, int64_t stride, int64_t keys, int64_t columns, uint32_t* to) {
    alignas(64) float last[kNumbers][kPanelLanes] = {};
    for (int64_t key = 0; key < keys; key += kNumbers, to += kPanelLanes) {
      const float* rows[kNumbers];
      for (int64_t i = 0; i < kNumbers; i++) {
        rows[i] = x + (key + i) * stride;
        if (key + kNumbers <= keys && columns == kPanelLanes) continue;
        if (key + i < keys) {
          std::memcpy(last[i], rows[i], columns * 4);
        } else {
          std::memset(last[i], 0, columns * 4);
        }
        rows[i] = last[i];
      }
      for (int64_t c = 0; c < kPanelLanes; c += S::kLanes) {
        if constexpr (kNumbers == 2) {
          S::store_codes(to + c, S::bf16_pairs(S::load(rows[0] + c), S::load(rows[1] + c)));
        } else {
          S::store_codes(to + c, S::nearest_bf16(S::load(rows[0] + c)));
        }
      }
    }
  }

  static constexpr PairKernels kernels() {
    return {kWords, widen_f16, pack<kGroupRows>, pack<kPanelLanes>, pack_values, scores,
            raise,  weigh,     add_values};
  }
};

}  // namespace
}  // namespace kvfold
