// Attention over keys and values of heads: its tiles, and the functions that an instruction set has for them.
//
// Numbers have 16 bits and lie in words of two, which a product adds up at once: whole numbers, each row or
// key with a power of two as its scale, or bfloat16 without (quant/attention.py).
//
//   rows    groups of group_rows rows         what is multiplied: queries
//   keys    panels of kPanelLanes keys        what it is multiplied by: keys, or any matrix by its columns
//           either: [scales of each, then words of dim][group_rows or kPanelLanes], or rows without scales
//           [group_rows][words of dim], as the instruction set takes them
//   values  panels of kPanelLanes columns     [words of keys][kPanelLanes], a scale for each key beside them
//
// A sequence's keys meet in blocks of kBlockKeys that start at multiples of it, so that a row's bits depend
// on its own keys alone. The softmax's maximum is a whole exponent: it multiplies what rounds to 16 bits by a
// power of two.
#pragma once

#include <cstdint>
#include <limits>

namespace kvfold {

constexpr int64_t kPanelLanes = 32;
// The weighted values of a group are read and written once a block: 2 of 66 accesses a lane.
constexpr int64_t kBlockKeys = 128;

inline int64_t panels_of(int64_t n) { return (n + kPanelLanes - 1) / kPanelLanes; }
constexpr int64_t pairs_of(int64_t numbers) { return (numbers + 1) / 2; }

// A row over the keys it has met.
struct Softmax {
  float exponent = -std::numeric_limits<float>::infinity();  // whole
  float sum = 0.0f;                                          // of 2^(score - exponent)
  float share = 1.0f;  // what a value weighs whose weight in the last block is 1
};

struct PairWords {
  int64_t scale_words;  // before the words of a row or key: 0 or 1
  int64_t step_words;   // that a product takes at a time
  int64_t group_rows;
  // Whole steps.
  constexpr int64_t words_of(int64_t numbers) const {
    return (pairs_of(numbers) + step_words - 1) / step_words * step_words;
  }
  // Of a row or key with its scale.
  constexpr int64_t row_words(int64_t dim) const { return scale_words + words_of(dim); }
};
// What no instruction set exceeds: memory outlives a change of it.
constexpr PairWords kMostWords{1, 16, 32};
constexpr int64_t kWholeGroups = 96;  // rows that are whole groups of every set

struct PairKernels : PairWords {
  const char* numbers;  // quant/attention.py, Numbers
  void (*widen_f16)(const uint8_t* halves, int64_t n, float* to);

  // Numbers to words; what is missing of the last word and of words_of is zeros.
  void (*pack_rows)(const float* x, int64_t stride, int64_t rows, int64_t dim, uint32_t* to);  // one group
  void (*pack_keys)(const float* x, int64_t stride, int64_t keys, int64_t dim,
                    uint32_t* to);  // up to kPanelLanes keys
  // Keys that are up to kPanelLanes columns of x, its rows being their dim numbers.
  void (*pack_columns)(const float* x, int64_t stride, int64_t dim, int64_t columns, uint32_t* to);
  // Whole values from an even key on, to panels panel_stride words apart; words_of(keys) are written.
  void (*pack_values)(const float* x, int64_t stride, int64_t keys, int64_t columns, uint32_t* to,
                      int64_t panel_stride, float* scales);

  // scores[i * stride + j]: row i of a group times key j, for whole panels of keys of dim numbers.
  void (*scores)(const uint32_t* q, int64_t rows, const uint32_t* k, int64_t dim, int64_t keys, float* scores,
                 int64_t stride);

  // Of rows of which row i sees the first clamp(seen + i, 0, keys) scores; all of them are overwritten.
  //
  // raise: exponents that no score of the block passes. Where one rises, the sum and the `width` weighted
  // values of the row follow.
  void (*raise)(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys, float scale_log2e,
                Softmax* states, float* values, int64_t width);
  // weigh: number j of weights[i * words_of(kBlockKeys)] = what value j weighs beside the row's `share`, 0
  // for keys that a row does not see, to the end of words_of what the last row sees; adds up sums.
  void (*weigh)(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys, float scale_log2e,
                const float* value_scales, Softmax* states, uint32_t* weights);
  // values[i * panels * kPanelLanes + c] += share of row i times its weights times column c. Panels of v are
  // v_stride words apart.
  void (*add_values)(const uint32_t* weights, const Softmax* states, int64_t rows, int64_t keys,
                     const uint32_t* v, int64_t v_stride, int64_t panels, float* values);
};

}  // namespace kvfold
