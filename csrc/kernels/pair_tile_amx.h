// The algorithms of pair_kernels.h on bfloat16 and matrix tiles, which multiply no whole numbers of 16 bits.
// Included last by isa/pairs_amx.cpp.
//
// A group is 32 rows, [rows][words]; a register tile is those rows by 32 keys or columns: four tiles of sums,
// two of rows, two of a panel. So a step of 16 words loads 4 tiles for 4 products.
#pragma once

#include "kernels/exp2.h"
#include "kernels/pair_panels.h"

namespace kvfold {
namespace {

template <class S>
struct PairTileAmx : PairPanels<S> {
  using Panels = PairPanels<S>;
  using Panels::kBlockWords;
  static constexpr int64_t kRows = S::kTileRows, kWords = S::kTileWords;
  static constexpr PairWords kGroup{0, kWords, 2 * kRows};
  static_assert(kWholeGroups % kGroup.group_rows == 0 && kPanelLanes == 2 * kWords &&
                kBlockWords % kWords == 0);

  static void set_shapes(int64_t rows) {
    const auto upper = static_cast<uint8_t>(std::min(rows, kRows));
    const auto lower = static_cast<uint8_t>(std::max<int64_t>(1, rows - kRows));
    typename S::TileShapes shapes;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = upper;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = lower;
    S::configure(shapes);
  }

  // Tiles 0 to 3 += rows a, `stride` words apart, times a panel.
  template <bool two>
  static void multiply(const uint32_t* a, int64_t stride, const uint32_t* panel, int64_t num_words) {
    for (int64_t i = 0; i < num_words; i += kWords, panel += kWords * kPanelLanes) {
      S::template load_tile<4>(a + i, stride * 4);
      S::template load_tile<6>(panel, kPanelLanes * 4);
      S::template load_tile<7>(panel + kWords, kPanelLanes * 4);
      if constexpr (two) S::template load_tile<5>(a + kRows * stride + i, stride * 4);
      S::template dot_pairs<0, 4, 6>();
      S::template dot_pairs<1, 4, 7>();
      if constexpr (two) {
        S::template dot_pairs<2, 5, 6>();
        S::template dot_pairs<3, 5, 7>();
      }
    }
  }
  template <bool two>
  static void clear() {
    S::template zero_tile<0>();
    S::template zero_tile<1>();
    if constexpr (two) {
      S::template zero_tile<2>();
      S::template zero_tile<3>();
    }
  }
  template <bool two>
  static void load(const float* sums, int64_t stride) {
    S::template load_tile<0>(sums, stride * 4);
    S::template load_tile<1>(sums + kWords, stride * 4);
    if constexpr (two) {
      S::template load_tile<2>(sums + kRows * stride, stride * 4);
      S::template load_tile<3>(sums + kRows * stride + kWords, stride * 4);
    }
  }
  template <bool two>
  static void store(float* sums, int64_t stride) {
    S::template store_tile<0>(sums, stride * 4);
    S::template store_tile<1>(sums + kWords, stride * 4);
    if constexpr (two) {
      S::template store_tile<2>(sums + kRows * stride, stride * 4);
      S::template store_tile<3>(sums + kRows * stride + kWords, stride * 4);
    }
  }

  template <bool two>
  static void score_panels(const uint32_t* q, const uint32_t* k, int64_t num_words, int64_t keys,
                           float* scores, int64_t stride) {
    for (int64_t key = 0; key < keys; key += kPanelLanes, k += num_words * kPanelLanes) {
      clear<two>();
      multiply<two>(q, num_words, k, num_words);
      store<two>(scores + key, stride);
    }
  }
  static void scores(const uint32_t* q, int64_t rows, const uint32_t* k, int64_t dim, int64_t keys,
                     float* scores, int64_t stride) {
    set_shapes(rows);
    (rows > kRows ? score_panels<true> : score_panels<false>)(q, k, kGroup.words_of(dim), keys, scores,
                                                              stride);
    S::release();
  }

  static void weigh(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys,
                    float scale_log2e, const float*, Softmax* states, uint32_t* weights) {
    const auto factor = S::set(scale_log2e), zero = S::zero();
    const auto ones = S::set_ints(0x3f803f80);
    const int64_t last = 2 * kGroup.words_of(Panels::seen_by(rows - 1, seen, keys));
    for (int64_t i = 0; i < rows; i++) {
      const int64_t n = Panels::seen_by(i, seen, keys);
      const uint32_t* words = weights + i * kBlockWords;
      auto* to = reinterpret_cast<uint16_t*>(weights + i * kBlockWords);
      int64_t j = 0;
      if (n > 0) {
        float* row = scores + i * stride;
        Panels::hide_rest(row, n);
        const auto minus = S::set(-states[i].exponent);
        for (; j < n; j += S::kLanes) {
          S::store_bf16(to + j, exp2<S>(S::fma(S::load(row + j), factor, minus)));
        }
        for (; j % (2 * S::kLanes) != 0; j++) to[j] = 0;
        auto sum = zero;
        for (int64_t at = 0; at < j / 2; at += S::kLanes) {
          sum = S::dot_bf16(sum, S::load_codes(words + at), ones);
        }
        states[i].sum += S::sum(sum);
      }
      for (; j < last; j++) to[j] = 0;
    }
  }

  template <bool two>
  static void add_panels(const uint32_t* weights, int64_t num_words, const uint32_t* v, int64_t v_stride,
                         int64_t panels, float* values) {
    for (int64_t panel = 0; panel < panels; panel++, v += v_stride, values += kPanelLanes) {
      load<two>(values, panels * kPanelLanes);
      multiply<two>(weights, kBlockWords, v, num_words);
      store<two>(values, panels * kPanelLanes);
    }
  }
  static void add_values(const uint32_t* weights, const Softmax*, int64_t rows, int64_t keys,
                         const uint32_t* v, int64_t v_stride, int64_t panels, float* values) {
    set_shapes(rows);
    // `values` counts columns through the panels.
    const auto add = rows > kRows ? add_panels<true> : add_panels<false>;
    add(weights, kGroup.words_of(keys), v, v_stride, panels, values);
    S::release();
  }

  static void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t dim, uint32_t* to) {
    const int64_t words = kGroup.words_of(dim);
    for (int64_t i = 0; i < rows; i++, x += stride, to += words) {
      auto* numbers = reinterpret_cast<uint16_t*>(to);
      S::to_bf16(x, numbers, dim);
      std::fill(numbers + dim, numbers + 2 * words, uint16_t{0});
    }
  }

  // Zeros after the last words that `numbers` numbers fill.
  static void fill(uint32_t* to, int64_t numbers) {
    std::fill(to + pairs_of(numbers) * kPanelLanes, to + kGroup.words_of(numbers) * kPanelLanes, 0u);
  }

  static void pack_keys(const float* x, int64_t stride, int64_t keys, int64_t dim, uint32_t* to) {
    Panels::template turn<kPanelLanes>(keys, dim, to,
                                       [&](int64_t i, int64_t at, int64_t n, uint16_t* numbers) {
                                         S::to_bf16(x + i * stride + at, numbers, n);
                                       });
    fill(to, dim);
  }

  static void pack_columns(const float* x, int64_t stride, int64_t dim, int64_t columns, uint32_t* to) {
    Panels::interleave(x, stride, dim, columns, to, [](int64_t, int64_t, const auto& even, const auto& odd) {
      return S::bf16_pairs(even, odd);
    });
    fill(to, dim);
  }

  static void pack_values(const float* x, int64_t stride, int64_t keys, int64_t columns, uint32_t* to,
                          int64_t panel_stride, float*) {
    for (int64_t at = 0; at < columns; at += kPanelLanes, to += panel_stride) {
      pack_columns(x + at, stride, keys, std::min(kPanelLanes, columns - at), to);
    }
  }

  static constexpr PairKernels kernels() {
    return {kGroup,      "bf16", Panels::widen_f16, pack_rows, pack_keys, pack_columns,
            pack_values, scores, Panels::raise,     weigh,     add_values};
  }
};

}  // namespace
}  // namespace kvfold
