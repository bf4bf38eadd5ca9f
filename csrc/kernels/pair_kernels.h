// Attention on bfloat16: its tiles, and the functions that an instruction set has for them.
//
// Numbers are rounded to bfloat16 and lie in words as the instruction set multiplies them: two that a product
// adds up at once, or one as the float32 it is (AVX2, where taking bfloat16 apart would cost as much as
// multiplying, and AVX-512 where products of pairs are the slower ones).
//
//   rows    groups of group_rows rows         [words of dim][group_rows]      what is multiplied: queries
//                                             or [group_rows][words of dim]   as the instruction set takes it
//   keys    panels of kPanelLanes keys        [words of dim][kPanelLanes]     what it is multiplied by: keys
//   values  panels of kPanelLanes columns     [words of keys][kPanelLanes]    or any matrix by its columns
//
// A sequence's keys meet in blocks of kBlockKeys that start at multiples of it, so that a row's bits depend
// on its own keys alone. The softmax is defined in quant/attention.py: its maximum is a whole exponent, so
// that a weight's rounding to bfloat16 does not depend on when it was computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace kvfold {

constexpr int64_t kPanelLanes = 32;
// The weighted values of a group are read and written once a block: 2 of 66 accesses a lane.
constexpr int64_t kBlockKeys = 128;

inline int64_t panels_of(int64_t n) { return (n + kPanelLanes - 1) / kPanelLanes; }

// A row over the keys it has met.
struct Softmax {
  float exponent = -std::numeric_limits<float>::infinity();  // whole
  float sum = 0.0f;                                          // of 2^(score - exponent) as bfloat16
};

// Keys in two parts, the second shared by all heads.
struct KeyPanels {
  const uint32_t* nope;
  int64_t nope_words;
  const uint32_t* rope;
  int64_t rope_words;

  KeyPanels from(int64_t key) const {
    const int64_t lanes = key / kPanelLanes * kPanelLanes;
    return {nope + nope_words * lanes, nope_words, rope + rope_words * lanes, rope_words};
  }
};

struct PairWords {
  int64_t word_numbers;  // 1 or 2
  int64_t step_words;    // that a product takes at a time
  int64_t group_rows;
  // Whole steps.
  constexpr int64_t words_of(int64_t numbers) const {
    const int64_t step = word_numbers * step_words;
    return (numbers + step - 1) / step * step_words;
  }
};
// What no instruction set exceeds: memory outlives a change of it.
constexpr PairWords kMostWords{1, 32, 32};

struct PairKernels : PairWords {
  void (*widen_f16)(const uint8_t* halves, int64_t n, float* to);

  // Numbers to words, rounded to nearest even; the last word is filled up with zeros, and words_of with words
  // of zeros but for values, whose keys and columns come in pieces: fill_values.
  void (*pack_rows)(const float* x, int64_t stride, int64_t rows, int64_t dim, uint32_t* to);  // one group
  void (*pack_keys)(const float* x, int64_t stride, int64_t keys, int64_t dim,
                    uint32_t* to);  // up to kPanelLanes keys
  void (*pack_values)(const float* x, int64_t stride, int64_t keys, int64_t columns,
                      uint32_t* to);  // up to kPanelLanes columns

  // scores[i * stride + j]: row i of a group times key j, for whole panels of keys.
  void (*scores)(const uint32_t* q, int64_t rows, KeyPanels k, int64_t keys, float* scores, int64_t stride);

  // Of rows of which row i sees the first clamp(seen + i, 0, keys) scores; those after it are overwritten.
  //
  // raise: exponents that no score of the block passes. Where one rises, the sum and the `width` weighted
  // values of the row follow.
  void (*raise)(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys, float scale_log2e,
                Softmax* states, float* values, int64_t width);
  // weigh: number j of weights[i * words_of(kBlockKeys)] = 2^(score * scale_log2e - exponent) as bfloat16, 0
  // for keys that a row does not see, to the end of words_of what the last row sees; adds them up.
  void (*weigh)(float* scores, int64_t stride, int64_t rows, int64_t seen, int64_t keys, float scale_log2e,
                Softmax* states, uint32_t* weights);
  // values[i * panels * kPanelLanes + c] += sum of weights of row i times column c. Panels of v are v_stride
  // words apart.
  void (*add_values)(const uint32_t* weights, int64_t rows, int64_t keys, const uint32_t* v, int64_t v_stride,
                     int64_t panels, float* values);

  // Zeros after the last of `keys` keys of a panel of values, up to words_of(keys).
  void fill_values(uint32_t* panel, int64_t keys) const {
    const int64_t filled = (keys + word_numbers - 1) / word_numbers;
    std::fill(panel + filled * kPanelLanes, panel + words_of(keys) * kPanelLanes, 0u);
  }
};

}  // namespace kvfold
