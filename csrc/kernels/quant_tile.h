// Tiles of prompts: rows of weights become a panel of codes once, and all rows of activations pass over it.
//
// A panel is a record for each 32 columns: codes [8 quads][vectors][lanes][4], one weight row a lane; scales
// [runs][vectors][lanes]; and where the type has them minimums, negated, in the same shape. Activations come
// in groups of kTileCols rows with a record for each 32 columns as well: codes [8 quads][rows][4], scales
// [rows], and where the type needs them the start of each sum [runs][rows] (minus the zero point times the
// sum of codes; where products of two are added in int16 first, of each such sum, [sums][rows][2 words]) and
// the sums for minimums [runs][rows]. So both are read front to back, every operand of a dot is one load (of
// a vector, or of four codes into every lane), and nothing is shuffled.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/quant_dot.h"

#define KVFOLD_UNROLLED _Pragma("GCC unroll 16")

namespace kvfold {
namespace {

// y[c * ldy + j] = lane j of the sums of column c, for the first n lanes.
template <class S, int vectors, int cols>
inline void store_tile(const typename S::Floats (&out)[vectors][cols], int64_t n, float* y, int64_t ldy) {
  KVFOLD_UNROLLED for (int v = 0; v < vectors; v++) {
    const int64_t lanes = n - v * S::kLanes;
    if (lanes <= 0) return;
    KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
      float* to = y + c * ldy + v * S::kLanes;
      if (lanes >= S::kLanes) {
        S::store(to, out[v][c]);
      } else {
        S::store_first(to, out[v][c], lanes);
      }
    }
  }
}

// Its inverse, or zeros where `start` is null.
template <class S, int vectors, int cols>
inline void load_tile(const float* start, int64_t ld, int64_t n, typename S::Floats (&out)[vectors][cols]) {
  KVFOLD_UNROLLED for (int v = 0; v < vectors; v++) {
    const int64_t lanes = n - v * S::kLanes;
    KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
      const float* from = start + c * ld + v * S::kLanes;
      out[v][c] = start == nullptr || lanes <= 0 ? S::zero()
                  : lanes >= S::kLanes           ? S::load(from)
                                                 : S::load_first(from, lanes);
    }
  }
}

// Bytes of the next group that are asked for before a group: with panels of few columns a group is a short
// piece, at whose beginning nothing else reads ahead. Two threads of a Zen 3, IQ4_NL, GMAC/s with none, 1 KiB
// and the whole piece: 2048 rows 74, 94, 94, 512 rows 88, 100, 91.
constexpr int64_t kAheadOfGroup = 1024;

// Calls group(columns as a constant, group of x, start, y) for the rows of x, kCols at a time.
template <class S, int kCols, class Group>
inline void for_groups(const uint8_t* x, int64_t group_bytes, int64_t rows, const float* start,
                       int64_t ld_start, float* y, int64_t ldy, const uint8_t* next, int64_t next_bytes,
                       const Group& group) {
  const int64_t groups = (rows + kCols - 1) / kCols, share = (next_bytes + groups - 1) / groups;
  for (int64_t g = 0; g < groups; g++, x += group_bytes, y += kCols * ldy) {
    for (int64_t i = g * share; i < std::min(next_bytes, (g + 1) * share); i += 64) {
      S::prefetch(next + i);
    }
    if (g + 1 < groups) {
      for (int64_t i = 0; i < kAheadOfGroup; i += 64) S::prefetch(x + group_bytes + i);
    }
    with_count<kCols>(rows - g * kCols, [&](auto cols) { group(cols, x, start, y); });
    if (start != nullptr) start += kCols * ld_start;
  }
}

// What stays in the first-level cache of 32 KiB beside a group of x: columns, whole blocks of any type.
constexpr int32_t columns_of_panel(int64_t bytes_of_256) {
  return static_cast<int32_t>(std::max<int64_t>(1, (20 << 10) / bytes_of_256) * 256);
}

// The panels of `vectors` vectors of rows, one shape of types.
template <class S, class F, int vectors>
struct CodePanel {
  static constexpr int kVectors = vectors, kRows = vectors * S::kLanes;

  // A record, in bytes.
  static constexpr int64_t kCodeBytes = 32 * kRows, kScaleBytes = F::kRuns * kRows * 4;
  static constexpr int64_t kRecord = kCodeBytes + kScaleBytes * (F::kHasMin ? 2 : 1);

  static constexpr int32_t kPanelColumns = columns_of_panel(256 / kBlock * kRecord);
  static int64_t panel_bytes(int64_t k) { return k / kBlock * kRecord; }

  // Any n.
  static void unpack(TakeApart take_apart, int elements, int bytes, int zero, const uint8_t* raw,
                     int64_t row_bytes, int64_t n, int64_t k, uint8_t* panel) {
    constexpr int kMost = 256;  // weights of the largest block
    const int runs = elements / F::kRun;
    for (int64_t at = 0; at < k; at += elements, raw += bytes) {
      alignas(64) uint8_t codes[kRows][kMost];
      float scales[kRows][kMost / F::kRun], minimums[kRows][kMost / F::kRun];
      for (int64_t i = 0; i < kRows; i++) {
        if (i < n) {
          take_apart(raw + i * row_bytes, zero, codes[i], scales[i], minimums[i]);
        } else {
          std::memset(codes[i], 0, elements);
          std::memset(scales[i], 0, runs * 4);
          std::memset(minimums[i], 0, runs * 4);
        }
      }
      for (int block = 0; block < elements / kBlock; block++, panel += kRecord) {
        for (int v = 0; v < kVectors; v++) {
          for (int half = 0; half < 2; half++) {
            typename S::Ints quads[4];
            S::transpose(codes[v * S::kLanes] + kBlock * block + 16 * half, kMost, quads);
            for (int j = 0; j < 4; j++) {
              S::store_codes(panel + ((4 * half + j) * kVectors + v) * S::kLanes * 4, quads[j]);
            }
          }
        }
        auto* to = reinterpret_cast<float*>(panel + kCodeBytes);
        for (int run = 0; run < F::kRuns; run++) {
          for (int i = 0; i < kRows; i++) {
            to[run * kRows + i] = scales[i][block * F::kRuns + run];
            if (F::kHasMin) to[(F::kRuns + run) * kRows + i] = -minimums[i][block * F::kRuns + run];
          }
        }
      }
    }
  }

  // The first n rows, whole vectors of them, from vectors: take(block, v, codes [8], scales) hands over 32
  // columns of the rows of a vector, four codes a lane, the scales of their runs, and minimums, negated.
  template <class Take>
  static void unpack_quads(int64_t n, int64_t k, uint8_t* panel, const Take& take) {
    constexpr int fields = F::kRuns * (F::kHasMin ? 2 : 1);
    for (int64_t block = 0; block < k / kBlock; block++, panel += kRecord) {
      for (int v = 0; v < kVectors; v++) {
        typename S::Ints codes[8];
        typename S::Floats scales[fields];
        if (v * S::kLanes < n) {
          take(block, v, codes, scales);
        } else {
          for (auto& quad : codes) quad = S::zero_ints();
          for (auto& field : scales) field = S::zero();
        }
        for (int q = 0; q < 8; q++) S::store_codes(panel + (q * kVectors + v) * S::kLanes * 4, codes[q]);
        auto* to = reinterpret_cast<float*>(panel + kCodeBytes) + v * S::kLanes;
        for (int field = 0; field < fields; field++) S::store(to + field * kRows, scales[field]);
      }
    }
  }
};

// What a lane begins with that adds sums of two products in int16: in either word minus the zero point times
// those of `count` codes that the word adds up.
template <int count>
inline int32_t start_in_pairs(const int8_t* codes, int zero) {
  int16_t words[2] = {};
  for (int i = 0; i < count; i++) {
    int16_t& word = words[i / 2 % 2];
    word = static_cast<int16_t>(word - zero * codes[i]);
  }
  int32_t both;
  std::memcpy(&both, words, sizeof both);
  return both;
}

// Where `pairs` sums of two products fit int16 they are added there, and widened together.
template <class S, class F, int pairs>
struct AnyTile : CodePanel<S, F, S::kCodeVectors> {
  using Panel = CodePanel<S, F, S::kCodeVectors>;
  using Panel::kCodeBytes, Panel::kRecord, Panel::kVectors;
  static constexpr int kCols = S::kCodeCols;
  static constexpr int kQuads = 8 / F::kRuns;  // of a run
  // Of products that are widened together, or one by one in a sum of a run: each begins with a start.
  static constexpr int kTogether = pairs == 1 ? kQuads : pairs;
  static constexpr int kNumStarts = F::kHasZero ? 8 / kTogether : 0;

  // A record of a group, in words of 4 bytes.
  static constexpr int64_t kStarts = 9 * kCols, kSums = kStarts + kNumStarts * kCols;
  static constexpr int64_t kGroup = kSums + (F::kHasMin ? F::kRuns * kCols : 0);

  static int64_t group_bytes(int64_t k) { return k / kBlock * kGroup * 4; }

  static void prepare(const float* x, int64_t ldx, const int32_t* pick, int64_t rows, int64_t k, int zero,
                      uint8_t* prepared) {
    for (int64_t first = 0; first < rows; first += kCols, prepared += group_bytes(k)) {
      for (int64_t c = 0; c < kCols; c++) {
        auto* record = reinterpret_cast<int32_t*>(prepared) + c;
        if (first + c >= rows) {  // an empty column, which tile() does not read
          continue;
        }
        const float* row = x + (pick ? pick[first + c] : first + c) * ldx;
        for (int64_t at = 0; at < k; at += kBlock, record += kGroup) {
          alignas(64) int8_t codes[kBlock];
          int32_t quads[8], halves[2];
          const float scale = S::quantize(row + at, codes, halves);
          std::memcpy(quads, codes, sizeof quads);
          for (int q = 0; q < 8; q++) record[q * kCols] = quads[q];
          std::memcpy(record + 8 * kCols, &scale, 4);
          if constexpr (pairs > 1) {
            for (int i = 0; i < kNumStarts; i++) {
              record[kStarts + i * kCols] = start_in_pairs<4 * kTogether>(codes + i * kTogether * 4, zero);
            }
          }
          for (int run = 0; run < F::kRuns; run++) {
            const int32_t sum = F::kRuns == 2 ? halves[run] : halves[0] + halves[1];
            if (F::kHasZero && pairs == 1) record[kStarts + run * kCols] = -zero * sum;
            const float scaled = scale * static_cast<float>(sum);
            if (F::kHasMin) std::memcpy(record + kSums + run * kCols, &scaled, 4);
          }
        }
      }
    }
  }

  // One group: `cols` rows of x by the n rows of the panel.
  template <int cols>
  static void group(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, const float* start,
                    int64_t ld_start, float* y, int64_t ldy) {
    typename S::Floats out[kVectors][cols];
    load_tile<S, kVectors, cols>(start, ld_start, n, out);
    const auto* words = reinterpret_cast<const int32_t*>(x);
    for (int64_t at = 0; at < k; at += kBlock, panel += kRecord, words += kGroup) {
      const auto* scales = reinterpret_cast<const float*>(panel + kCodeBytes);
      const auto* x_scales = reinterpret_cast<const float*>(words + 8 * kCols);
      KVFOLD_UNROLLED for (int run = 0; run < F::kRuns; run++) {
        typename S::Ints sum[kVectors][cols];
        [[maybe_unused]] typename S::Ints together[kVectors][cols];
        KVFOLD_UNROLLED for (int i = 0; i < kQuads; i++) {
          const int q = run * kQuads + i;
          const bool is_first = i % kTogether == 0;
          typename S::Ints w[kVectors];
          KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
            w[v] = S::load_codes(panel + (q * kVectors + v) * S::kLanes * 4);
            if constexpr (pairs > 1) w[v] = S::held(w[v]);
          }
          KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
            const auto four = S::four_codes(words + q * kCols + c);
            [[maybe_unused]] const auto begin = F::kHasZero && is_first
                                                    ? S::set_ints(words[kStarts + q / kTogether * kCols + c])
                                                    : S::zero_ints();
            KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
              if constexpr (pairs == 1) {
                if (is_first) sum[v][c] = begin;
                sum[v][c] = S::template dot<F::kWide>(sum[v][c], w[v], four);
              } else {
                const auto two = S::pairs(w[v], four);
                if (is_first) {
                  together[v][c] = F::kHasZero ? S::add_words(begin, two) : two;
                } else {
                  together[v][c] = S::add_words(together[v][c], two);
                }
                if (i % kTogether == kTogether - 1) {
                  const auto widened = S::widened(together[v][c]);
                  sum[v][c] = i < kTogether ? widened : S::add_ints(sum[v][c], widened);
                }
              }
            }
          }
        }
        KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
          const auto scale = S::load(scales + (run * kVectors + v) * S::kLanes);
          KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
            out[v][c] = S::fma(S::mul(S::to_floats(sum[v][c]), scale), S::set(x_scales[c]), out[v][c]);
          }
        }
        if (F::kHasMin) {
          const auto* x_sums = reinterpret_cast<const float*>(words + kSums) + run * kCols;
          KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
            const auto minimum = S::load(scales + ((F::kRuns + run) * kVectors + v) * S::kLanes);
            KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
              out[v][c] = S::fma(minimum, S::set(x_sums[c]), out[v][c]);
            }
          }
        }
      }
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

// Weights that need all of int8 where a set has no dot for them: x as magnitudes m and signs s, 0 or -1, so
// that w x = m (w ^ s) - m s. The last term belongs to x alone and is where sums start. Four weights a lane
// take an exclusive or, two products and an addition, one cycle of Zen 3, if little else is issued: a vector
// of weights is an operand from memory, and four of them share what is loaded of x.
//
// A panel is as above; activations are [8 quads][rows][magnitudes, signs][4], scales [rows], starts [rows].
template <class S, class F>
struct SignTile : CodePanel<S, F, S::kSignVectors> {
  static_assert(F::kRuns == 1 && !F::kHasZero && !F::kHasMin);
  using Panel = CodePanel<S, F, S::kSignVectors>;
  using Panel::kCodeBytes, Panel::kRecord, Panel::kVectors;
  static constexpr int kCols = S::kSignCols;
  static constexpr int64_t kScales = 16 * kCols, kStarts = kScales + kCols, kGroup = kStarts + kCols;

  static int64_t group_bytes(int64_t k) { return k / kBlock * kGroup * 4; }

  static void prepare(const float* x, int64_t ldx, const int32_t* pick, int64_t rows, int64_t k, int,
                      uint8_t* prepared) {
    for (int64_t first = 0; first < rows; first += kCols, prepared += group_bytes(k)) {
      for (int64_t c = 0; c < std::min<int64_t>(kCols, rows - first); c++) {
        auto* record = reinterpret_cast<int32_t*>(prepared);
        const float* row = x + (pick ? pick[first + c] : first + c) * ldx;
        for (int64_t at = 0; at < k; at += kBlock, record += kGroup) {
          alignas(64) int8_t codes[kBlock];
          alignas(64) uint8_t magnitudes[kBlock], signs[kBlock];
          int32_t halves[2], negative = 0;
          const float scale = S::quantize(row + at, codes, halves);
          for (int i = 0; i < kBlock; i += 16)
            negative += S::take_signs(codes + i, magnitudes + i, signs + i);
          for (int q = 0; q < 8; q++) {
            std::memcpy(record + (q * kCols + c) * 2, magnitudes + 4 * q, 4);
            std::memcpy(record + (q * kCols + c) * 2 + 1, signs + 4 * q, 4);
          }
          std::memcpy(record + kScales + c, &scale, 4);
          record[kStarts + c] = -negative;
        }
      }
    }
  }

  template <int cols>
  static void group(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, const float* start,
                    int64_t ld_start, float* y, int64_t ldy) {
    typename S::Floats out[kVectors][cols];
    load_tile<S, kVectors, cols>(start, ld_start, n, out);
    const auto* words = reinterpret_cast<const int32_t*>(x);
    for (int64_t at = 0; at < k; at += kBlock, panel += kRecord, words += kGroup) {
      typename S::Ints sum[kVectors][cols];
      KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
        const auto of_x = S::four_codes(words + kStarts + c);
        KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) sum[v][c] = of_x;
      }
      KVFOLD_UNROLLED for (int q = 0; q < 8; q++) {
        KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
          const int32_t* quad = words + (q * kCols + c) * 2;
          const auto magnitudes = S::held(S::four_codes(quad)), signs = S::held(S::four_codes(quad + 1));
          KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
            const auto turned = S::xor_loaded(signs, panel + (q * kVectors + v) * S::kLanes * 4);
            sum[v][c] = S::add_ints(sum[v][c], S::widened(S::pairs(magnitudes, turned)));
          }
        }
      }
      const auto* scales = reinterpret_cast<const float*>(panel + kCodeBytes);
      const auto* x_scales = reinterpret_cast<const float*>(words + kScales);
      KVFOLD_UNROLLED for (int v = 0; v < kVectors; v++) {
        const auto scale = S::load(scales + v * S::kLanes);
        KVFOLD_UNROLLED for (int c = 0; c < cols; c++) {
          out[v][c] = S::fma(S::mul(S::to_floats(sum[v][c]), scale), S::set(x_scales[c]), out[v][c]);
        }
      }
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

template <class S, class T>
struct QuantTile {
  using Like = typename Format<S, T>::Like;
  using Any = std::conditional_t<S::kPairSums && Like::kWide, SignTile<S, Like>,
                                 AnyTile<S, Like, Format<S, T>::kPairs>>;
  static constexpr int kZero = Format<S, T>::kZero;

  static void prepare(const float* x, int64_t ldx, const int32_t* pick, int64_t rows, int64_t k,
                      uint8_t* prepared) {
    Any::prepare(x, ldx, pick, rows, k, kZero, prepared);
  }

  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, uint8_t* panel) {
    if constexpr (Fast<S, T>::kUnpack) {
      if (n == Any::kRows) return Fast<S, T>::unpack(raw, row_bytes, k, panel);
    }
    if constexpr (Fast<S, T>::kQuads) {
      using Of32 = Fast<S, T>;
      if (n % S::kLanes == 0) {
        static_assert(Like::kRuns == 1 && !Like::kHasMin);  // so that scales are all that is to be set
        return Any::unpack_quads(n, k, panel, [&](int64_t block, int v, auto& codes, auto& scales) {
          const uint8_t* first = raw + v * S::kLanes * row_bytes + block * Of32::kBytes;
          scales[0] = Of32::quads(first, row_bytes, codes);
        });
      }
    }
    Any::unpack(best_take_apart<S, T>(), T::elements, sizeof(T), kZero, raw, row_bytes, n, k, panel);
  }
};

}  // namespace
}  // namespace kvfold
