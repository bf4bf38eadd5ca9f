// Row dots and panels of rows side by side (kernels/side_by_side.h): the 16 rows of a group are the lanes of
// one or two vectors, one row a lane.
//
// A lane meets four codes of x at a time, the same ones for all rows, so x is broadcast from memory, which
// takes no vector port; nothing is summed across a vector, and a vector of scales is one load.
#pragma once

#include <utility>

#include "kernels/quant_set.h"
#include "kernels/side_by_side.h"

namespace kvfold {
namespace {

// 32 activations as a row dot reads them, for weights that are codes less `zero`: with what the sum of each
// of `runs` runs begins with, in pairs where products of two are added in int16.
template <int zero, int runs, bool in_pairs>
struct ZeroLanes {
  int8_t codes[32];
  float scale;
  int32_t starts[runs];

  void set(const int8_t* of_x, const int32_t* halves, float x_scale) {
    std::memcpy(codes, of_x, 32);
    scale = x_scale;
    for (int run = 0; run < runs; run++) {
      if constexpr (in_pairs) {
        starts[run] = start_in_pairs<32 / runs>(of_x + 32 / runs * run, zero);
      } else {
        starts[run] = -zero * (runs == 2 ? halves[run] : halves[0] + halves[1]);
      }
    }
  }
};

// The same for weights with minimums.
struct MinLanes {
  int8_t codes[32];
  float scale, sum;  // scale times the sum of the codes

  void set(const int8_t* of_x, const int32_t* halves, float x_scale) {
    std::memcpy(codes, of_x, 32);
    scale = x_scale;
    sum = x_scale * static_cast<float>(halves[0] + halves[1]);
  }
};

// prefetch(p) for every line of the first `bytes` of a mixed block: what it has before its codes.
template <int64_t bytes, class Mixed, class Prefetch>
inline void prefetch_first(const Mixed* block, const Prefetch& prefetch) {
  const auto* first = reinterpret_cast<const uint8_t*>(block);
  KVFOLD_UNROLLED for (int64_t at = 0; at < bytes; at += 64) prefetch(first + at);
}

// Zeros, for sums that begin.
template <class S, int rows, int vectors>
inline void clear(typename S::Floats (&sums)[rows][vectors]) {
  for (auto& of_row : sums) {
    for (auto& sum : of_row) sum = S::zero();
  }
}

// What a set has for a type, in simd/*_side_by_side.h:
//   Set, Type, X     X: 32 activations as above
//   kMostRows        rows of x that meet a group together
//   kStreams         groups that a row of x meets at a time, equal shares of the rows apart: 1 or 2
//   kAhead           bytes read ahead of each stream
//   block<rows, groups>(w, x, ahead, out)   adds the products of a mixed block of each group, and asks for
//                    the bytes that are so far ahead of it
//   quads(w, part, v, codes)   codes [8] of 32 columns of vector v of a group, as a panel of the set has them
//   scales(w, part, v, scales)   and scales of their runs, then minimums, negated, where the type has them
template <class Of>
struct SideBySideProducts {
  using S = typename Of::Set;
  using T = typename Of::Type;
  using X = typename Of::X;
  using Mixed = SideBySide<T>;
  using Dot = AnyDot<S, typename Format<S, T>::Like>;
  using Tile = typename QuantTile<S, T>::Any;
  static constexpr int kGroupVectors = kRowsSideBySide / S::kLanes;
  using Like = typename Format<S, T>::Like;
  static constexpr int kParts = T::elements / kBlock;  // of x that a mixed block meets
  static_assert(Tile::kRows % kRowsSideBySide == 0);
  // Prepared rows take no more than where rows lie one by one, so that weights may move between the two.
  static_assert(sizeof(X) <= Dot::kCodes * kBlock + 2 * Like::kRuns * sizeof(float));

  static void prepare(const float* x, int64_t k, uint8_t* prepared) {
    for (int64_t at = 0; at < k; at += kBlock, prepared += sizeof(X)) {
      alignas(64) int8_t codes[kBlock];
      int32_t halves[2];
      const float scale = S::quantize(x + at, codes, halves);
      reinterpret_cast<X*>(prepared)->set(codes, halves, scale);
    }
  }

  // The last blocks of a group, from which what is read ahead lies behind its end.
  static int64_t last_blocks(int64_t k) {
    constexpr int64_t kMost = (Of::kAhead + sizeof(Mixed) - 1) / sizeof(Mixed);
    return std::min(kMost, k / T::elements);
  }

  // y[r * ldy + 16 at[g] + i] of the groups number at[g] of raw. ahead_of_last() is called where the last
  // blocks begin: how far ahead of them is read.
  template <int rows, int groups, class AheadOfLast>
  static void multiply(const uint8_t* raw, int64_t row_bytes, const int64_t (&at)[groups], int64_t k,
                       const uint8_t* prepared, float* y, int64_t ldy, const AheadOfLast& ahead_of_last) {
    constexpr int vectors = groups * kGroupVectors;
    const X* x[rows];
    const Mixed* w[groups];
    typename S::Floats out[rows][vectors];
    KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
      x[r] = reinterpret_cast<const X*>(prepared + r * Dot::bytes(k));
    }
    KVFOLD_UNROLLED for (int g = 0; g < groups; g++) {
      w[g] = reinterpret_cast<const Mixed*>(raw + at[g] * kRowsSideBySide * row_bytes);
    }
    clear<S>(out);
    int64_t left = k / T::elements, ahead = Of::kAhead;
    for (const int64_t until : {last_blocks(k), int64_t{0}}) {
      if (until == 0) ahead = ahead_of_last();
      for (; left > until; left--) {
        Of::template block<rows, groups>(w, x, ahead, out);
        KVFOLD_UNROLLED for (int r = 0; r < rows; r++) x[r] += kParts;
        KVFOLD_UNROLLED for (int g = 0; g < groups; g++) w[g]++;
      }
    }
    KVFOLD_UNROLLED for (int r = 0; r < rows; r++) {
      KVFOLD_UNROLLED for (int v = 0; v < vectors; v++) {
        float* to = y + r * ldy + at[v / kGroupVectors] * kRowsSideBySide;
        S::store(to + S::kLanes * (v % kGroupVectors), out[r][v]);
      }
    }
  }

  // One row of x meets kStreams groups at a time, of as many equal shares of the rows: they share what is
  // read of x. More rows of x meet one group, as sums of more do not fit the registers; the next rows find it
  // in cache.
  static void dot(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, const uint8_t* prepared,
                  int64_t count, float* y, int64_t ldy, const RowsAfter& after) {
    const int64_t groups = n / kRowsSideBySide, share = (groups + Of::kStreams - 1) / Of::kStreams;
    const uint8_t* last = raw + share * kRowsSideBySide * row_bytes - last_blocks(k) * sizeof(Mixed);
    RowsAfter not_asked = after;
    int64_t to_after = Of::kAhead;  // from the last blocks of a stream
    for (int64_t at = 0; at < share; at++) {
      const bool is_pair = Of::kStreams == 2 && share + at < groups;
      const auto ahead = [&] {
        if (at + 1 < share) return Of::kAhead;
        if (const uint8_t* next = std::exchange(not_asked, RowsAfter())()) to_after = next - last;
        return to_after;
      };
      for (int64_t r = 0; r < count; r += Of::kMostRows) {
        const uint8_t* of_x = prepared + r * Dot::bytes(k);
        float* to = y + r * ldy;
        if (count - r > 1) {
          with_count<Of::kMostRows>(count - r, [&](auto some) {
            constexpr int rows = decltype(some)::value;
            multiply<rows, 1>(raw, row_bytes, {at}, k, of_x, to, ldy, ahead);
            if (is_pair) multiply<rows, 1>(raw, row_bytes, {share + at}, k, of_x, to, ldy, ahead);
          });
        } else if (is_pair) {
          multiply<1, 2>(raw, row_bytes, {at, share + at}, k, of_x, to, ldy, ahead);
        } else {
          multiply<1, 1>(raw, row_bytes, {at}, k, of_x, to, ldy, ahead);
        }
      }
    }
  }

  // For the panels of a set, of codes less kZero.
  template <class Panels>
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, uint8_t* panel) {
    Panels::unpack_quads(n, k, panel, [&](int64_t block, int vector, auto& codes, auto& scales) {
      const uint8_t* group = raw + vector / kGroupVectors * kRowsSideBySide * row_bytes;
      const Mixed& w = reinterpret_cast<const Mixed*>(group)[block / kParts];
      const int part = static_cast<int>(block % kParts);
      Of::quads(w, part, vector % kGroupVectors, codes);
      Of::scales(w, part, vector % kGroupVectors, scales);
    });
  }

  static constexpr MatrixKernels kernels(int32_t id) {
    return {side_by_side_id(id),
            Rounding::kInt8,
            kRowsSideBySide,
            Dot::bytes,
            prepare,
            dot,
            Tile::kRows,
            Tile::kCols,
            S::kNearPanels,
            Tile::group_bytes,
            QuantTile<S, T>::prepare,
            Tile::kPanelColumns,
            Tile::panel_bytes,
            unpack<Tile>,
            Tile::tile};
  }
};

// A set's kernels of them.
template <template <class> class Of>
constexpr KernelTable kSideBySide = [] {
  KernelTable all;
  for_each_side_by_side([&](auto type, int32_t id) {
    all.add(SideBySideProducts<Of<typename decltype(type)::type>>::kernels(id));
  });
  return all;
}();

}  // namespace
}  // namespace kvfold
