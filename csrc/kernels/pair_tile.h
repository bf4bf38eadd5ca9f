// The algorithms of pair_kernels.h on whole numbers once, over the vocabulary of an instruction set. Included
// last by isa/pairs_*.cpp.
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
#include "kernels/pair_panels.h"

#define KVFOLD_UNROLLED_PAIRS _Pragma("GCC unroll 16")

namespace kvfold {
namespace {

template <class S>
struct PairTile : PairPanels<S> {
  using Panels = PairPanels<S>;
  using Ints = typename S::Ints;
  using Panels::kBlockWords;
  static constexpr int64_t kGroupRows = 12;
  static constexpr PairWords kWords{1, 1, kGroupRows};
  static constexpr int kVectors = S::kPairVectors, kRows = S::kPairRows;
  static_assert(kWholeGroups % kGroupRows == 0 && kGroupRows % kRows == 0 &&
                kPanelLanes % (kVectors * S::kLanes) == 0);

  static constexpr float kOne = 32767.0f;

  // The power of two that a row is multiplied by whose `size` may then reach kOne, and its inverse.
  struct Scale {
    float factor, scale;

    explicit Scale(float size) {
      if (!(size <= 0x1p60f)) {
        factor = 0.0f, scale = std::numeric_limits<float>::quiet_NaN();
      } else if (size < 0x1p-60f) {
        factor = scale = 0.0f;
      } else {
        const float most = kOne / size;
        uint32_t bits;
        std::memcpy(&bits, &most, 4);
        bits &= 0x7f800000;  // its power of two
        std::memcpy(&factor, &bits, 4);
        scale = 1.0f / factor;
      }
    }
  };
  // Vectors of n numbers, zeros after the last.
  template <class Use>
  static void for_vectors(const float* x, int64_t n, const Use& use) {
    int64_t i = 0;
    for (; i + S::kLanes <= n; i += S::kLanes) use(S::load(x + i));
    if (i < n) use(S::load_first(x + i, n - i));
  }
  static Scale of_length(const float* x, int64_t n) {
    auto squares = S::zero();
    for_vectors(x, n, [&](const auto& v) { squares = S::fma(v, v, squares); });
    return Scale(std::sqrt(S::sum(squares)));
  }
  static Scale of_largest(const float* x, int64_t n) {
    auto largest = S::zero(), sum = S::zero();
    for_vectors(x, n,
                [&](const auto& v) { largest = S::max(largest, S::magnitude(v)), sum = S::add(sum, v); });
    return Scale(S::largest(largest) + 0.0f * S::sum(sum));  // a maximum forgets NaN
  }

  // Scales, then words.
  template <int64_t width>
  static void pack(const float* x, int64_t stride, int64_t count, int64_t dim, uint32_t* to) {
    float factors[width], scales[width] = {};
    for (int64_t i = 0; i < count; i++) {
      const Scale of = of_length(x + i * stride, dim);
      factors[i] = of.factor, scales[i] = of.scale;
    }
    std::memcpy(to, scales, sizeof scales);
    Panels::template turn<width>(
        count, dim, to + width, [&](int64_t i, int64_t at, int64_t n, uint16_t* numbers) {
          S::to_shorts(x + i * stride + at, factors[i], reinterpret_cast<int16_t*>(numbers), n);
        });
  }

  static void pack_columns(const float* x, int64_t stride, int64_t dim, int64_t columns, uint32_t* to) {
    alignas(64) float lengths[kPanelLanes] = {}, factors[kPanelLanes], scales[kPanelLanes];
    for (int64_t row = 0; row < dim; row++) {
      for (int64_t c = 0; c < columns; c++) lengths[c] += x[row * stride + c] * x[row * stride + c];
    }
    for (int64_t c = 0; c < kPanelLanes; c++) {
      const Scale of(std::sqrt(lengths[c]));
      factors[c] = of.factor, scales[c] = of.scale;
    }
    std::memcpy(to, scales, sizeof scales);
    Panels::interleave(x, stride, dim, columns, to + kPanelLanes,
                       [&](int64_t, int64_t c, const auto& even, const auto& odd) {
                         const auto factor = S::load(factors + c);
                         return S::whole_pairs(S::mul(even, factor), S::mul(odd, factor));
                       });
  }

  static void pack_values(const float* x, int64_t stride, int64_t keys, int64_t columns, uint32_t* to,
                          int64_t panel_stride, float* scales) {
    for (int64_t first = 0; first < keys; first += kBlockKeys) {
      const int64_t n = std::min(kBlockKeys, keys - first);
      const float* rows = x + first * stride;
      float factors[kBlockKeys + 1];
      for (int64_t i = 0; i < n; i++) {
        const Scale of = of_largest(rows + i * stride, columns);
        factors[i] = of.factor, scales[first + i] = of.scale;
      }
      factors[n] = 0.0f;
      uint32_t* panel = to + pairs_of(first) * kPanelLanes;
      for (int64_t at = 0; at < columns; at += kPanelLanes, panel += panel_stride) {
        Panels::interleave(rows + at, stride, n, std::min(kPanelLanes, columns - at), panel,
                           [&](int64_t row, int64_t, const auto& even, const auto& odd) {
                             return S::whole_pairs(S::mul(even, S::set(factors[row])),
                                                   S::mul(odd, S::set(factors[row + 1])));
                           });
      }
    }
  }

  // sum[v][r] = rows [r * row_step + i * step] times panel [i * kPanelLanes + v * kLanes], i < num_words.
  template <int row_step, int step, int rows>
  static void multiply(const uint32_t* a, const uint32_t* panel, int64_t num_words,
                       Ints (&sum)[kVectors][rows]) {
    KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) {
      KVFOLD_UNROLLED_PAIRS for (int r = 0; r < rows; r++) sum[v][r] = S::zero_ints();
    }
    for (int64_t i = 0; i < num_words; i++, a += step, panel += kPanelLanes) {
      Ints w[kVectors];
      KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) w[v] = S::load_codes(panel + v * S::kLanes);
      KVFOLD_UNROLLED_PAIRS for (int r = 0; r < rows; r++) {
        const auto x = S::four_codes(a + r * row_step);
        KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) sum[v][r] =
            S::dot_shorts(sum[v][r], w[v], x);
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

  static void scores(const uint32_t* q, int64_t rows, const uint32_t* k, int64_t dim, int64_t keys,
                     float* scores, int64_t stride) {
    const auto* row_scales = reinterpret_cast<const float*>(q);
    for (int64_t key = 0; key < keys; key += kPanelLanes, k += kWords.row_words(dim) * kPanelLanes) {
      const auto* key_scales = reinterpret_cast<const float*>(k);
      for_rows(rows, [&](int64_t first, auto count) {
        constexpr int n = decltype(count)::value;
        for (int lane = 0; lane < kPanelLanes; lane += kVectors * S::kLanes) {
          Ints sum[kVectors][n];
          multiply<1, kGroupRows>(q + kGroupRows + first, k + kPanelLanes + lane, kWords.words_of(dim), sum);
          KVFOLD_UNROLLED_PAIRS for (int r = 0; r < n; r++) {
            const auto row_scale = S::set(row_scales[first + r]);
            KVFOLD_UNROLLED_PAIRS for (int v = 0; v < kVectors; v++) {
              const auto scale = S::mul(S::load(key_scales + lane + v * S::kLanes), row_scale);
              S::store(scores + (first + r) * stride + key + lane + v * S::kLanes,
                       S::mul(S::to_floats(sum[v][r]), scale));
            }
          }
        }
      });
    }
  }

  static void weigh(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys,
                    float scale_log2e, const float* value_scales, Softmax* states, uint32_t* weights) {
    const auto factor = S::set(scale_log2e);
    const int64_t last = 2 * pairs_of(Panels::seen_by(rows - 1, seen, keys));
    for (int64_t i = 0; i < rows; i++) {
      const int64_t n = Panels::seen_by(i, seen, keys);
      auto* to = reinterpret_cast<int16_t*>(weights + i * kBlockWords);
      int64_t j = 0;
      if (n > 0) {
        float* row = scores + i * stride;
        Panels::hide_rest(row, n);
        Softmax& state = states[i];
        const auto minus = S::set(-state.exponent);
        auto sum = S::zero(), total = S::zero();
        // Of keys behind the n-th no scale is read: it may be NaN.
        const auto add = [&](const auto& scales) {
          const auto share = exp2<S>(S::fma(S::load(row + j), factor, minus)), scaled = S::mul(share, scales);
          S::store(row + j, scaled);
          sum = S::add(sum, share), total = S::add(total, scaled);
          j += S::kLanes;
        };
        for_vectors(value_scales, n, add);
        state.sum += S::sum(sum);
        const float whole = S::sum(total);
        state.share = whole / kOne;
        // Less is too little beside what raised the exponent, and the factor of it might be infinite.
        S::to_shorts(row, whole >= 0x1p-110f ? kOne / whole : 0.0f, to, j);
      }
      for (; j < last; j++) to[j] = 0;
    }
  }

  static void add_values(const uint32_t* weights, const Softmax* states, int64_t rows, int64_t keys,
                         const uint32_t* v, int64_t v_stride, int64_t panels, float* values) {
    const int64_t width = panels * kPanelLanes;
    for (int64_t panel = 0; panel < panels; panel++, v += v_stride, values += kPanelLanes) {
      for_rows(rows, [&](int64_t first, auto count) {
        constexpr int n = decltype(count)::value;
        for (int lane = 0; lane < kPanelLanes; lane += kVectors * S::kLanes) {
          Ints sum[kVectors][n];
          multiply<kBlockWords, 1>(weights + first * kBlockWords, v + lane, pairs_of(keys), sum);
          KVFOLD_UNROLLED_PAIRS for (int r = 0; r < n; r++) {
            const auto share = S::set(states[first + r].share);
            KVFOLD_UNROLLED_PAIRS for (int c = 0; c < kVectors; c++) {
              float* at = values + (first + r) * width + lane + c * S::kLanes;
              S::store(at, S::fma(S::to_floats(sum[c][r]), share, S::load(at)));
            }
          }
        }
      });
    }
  }

  static constexpr PairKernels kernels() {
    return {kWords,
            "int16",
            Panels::widen_f16,
            pack<kGroupRows>,
            pack<kPanelLanes>,
            pack_columns,
            pack_values,
            scores,
            Panels::raise,
            weigh,
            add_values};
  }
};

}  // namespace
}  // namespace kvfold
