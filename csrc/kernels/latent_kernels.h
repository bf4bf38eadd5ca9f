// Attention over latents where products round: its tiles, and the functions that an instruction set has for
// them. quant/attention.py is the definition.
//
// A tile is kHeadLanes heads of one row times up to a page of keys. Heads are the lanes of a vector and keys
// are read four bytes at a time into every lane: a cached row is used as it lies in memory, nothing is turned
// around but pairs of values, and the softmax of a head stays in its lane.
//
//   queries   [pairs of latent][kHeadLanes]  words: two bfloat16 that a product adds up at once, of
//   kLatentStep
//                                            numbers at a time: zeros after the last
//             or, for a q8_0 cache, a record for each 32 numbers: codes [8][kHeadLanes] words of four,
//             scales [kHeadLanes]; where a set has no product of two signed codes, magnitudes and signs
//             [8][kHeadLanes] of each, scales and starts of sums [kHeadLanes]
//   keys      [keys][stride]                 bfloat16, or q8_0 in the cache itself
//   values    [columns / 16][pairs of keys of a page][16]   words of two bfloat16
//             or, 32 columns at a time, of two codes as int16
//   weighted  [columns][kHeadLanes]          float32 sums of weights times values
//
// What weights, values and weighted values are in between is the instruction set's own: these are the layouts
// of all without matrix tiles (latent_tile_amx.h).
//
// Values of a q8_0 cache are multiplied as the whole numbers they are. A weight is then a whole number of 15
// bits for each page, times the scale of the value's block as a share, in 15 bits again, of the largest of
// the page: an int16 for each head, key and 32 columns.
//
// Shapes are the same on every instruction set, so what a workspace holds does not depend on which one runs.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/cache_rows.h"

namespace kvfold {

constexpr int64_t kHeadLanes = 16;
constexpr int64_t kValueColumns = 16;  // of a block of values
constexpr int64_t kLatentStep = 32;    // queries and keys are whole steps of numbers, values of columns
constexpr int64_t kPagePairs = kPageTokens / 2;
constexpr int64_t kMostRecordWords = 18;  // of kLatentStep numbers of a head's query

// The heads of a tile over the keys they have met.
struct LatentState {
  alignas(64) float exponent[kHeadLanes];  // whole; minus infinity before the first key
  float sum[kHeadLanes];                   // of 2^(score - exponent) as bfloat16
};

constexpr float kWholeOne = 32767.0f;  // weights and shares of 1
constexpr int64_t kShareBlocks = 16;   // of 512 columns

// Pages of a q8_0 cache whose values are added up at a time: 32 columns of one after the other, so that what
// is made of them, and the sums they meet, stay in the first-level cache.
constexpr int64_t kPagesAtOnce = 2;

constexpr int64_t kScaleBlocks = 32;  // of a row, whose scales lie side by side

// A q8_0 page.
struct CodePage {
  const uint8_t* rows;
  int64_t keys;
  float* scales;     // [blocks of a row / kScaleBlocks][kPageTokens][kScaleBlocks]
  uint32_t* shares;  // [blocks / kShareBlocks][kPagePairs][kShareBlocks], of two keys each: scales in units
                     // of largest / kWholeOne
  float* largest;    // [blocks] scales of the page. Blocks of kQ8Block columns, rounded up to kShareBlocks
  // What is wanted after the page: brought near a few lines at a time by its scores and by its values.
  const uint8_t* next;
  int64_t next_lines;
};
// Of next, lines for a block of 16 keys in scores, and for one of the page in values. A page of n blocks a
// row has 34 n lines: 16 n and, where all but two of 18 blocks are values, 18.7 n.
constexpr int64_t kLineBytes = 64, kScoreLines = 4, kValueLines = 21;
// What a tile of heads has for the values of pages, and their sums.
struct CodeSums {
  const uint32_t* words;  // [pages][kPagePairs][kHeadLanes]
  const float* factors;   // [pages][kHeadLanes]
  float* weighted;
};

// `k` weights of a row to float32, as kernels/decode.h has them.
using DecodeWeights = void (*)(const uint8_t* row, int64_t k, float* out);

// Weight rows that are folded by columns at a time: 9 KiB of 512 weights in four bits.
constexpr int64_t kColumnRows = 16;
// out[c] += sum over kColumnRows rows j of x[j] times weight c of row j, in float32 and without a panel.
// Meanwhile rows that start at `next` are brought near, wherever that is.
using FoldColumns = void (*)(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                             const uint8_t* next);

struct LatentKernels {
  // Queries of up to kHeadLanes heads, `stride` apart; absent heads are zeros.
  void (*pack_pairs)(const float* q, int64_t stride, int64_t heads, int64_t latent, uint32_t* to);
  void (*pack_codes)(const float* q, int64_t stride, int64_t heads, int64_t latent, uint32_t* to);

  // Cached rows of any type but q8_0 to bfloat16 rows of `stride` numbers: `count` and then zeros.
  void (*widen)(CacheType type, const uint8_t* rows, int64_t row_bytes, int64_t keys, int64_t count,
                uint16_t* to, int64_t stride);
  // Values out of bfloat16 rows. Whole steps of columns are read; after the last key come zeros as far as a
  // product reads.
  void (*pair_values)(const uint16_t* rows, int64_t stride, int64_t keys, int64_t columns, uint32_t* to);
  // Scales of a q8_0 page's `blocks`, shares and largest scales of the blocks of `columns`.
  void (*read_scales)(const CodePage& page, int64_t row_bytes, int64_t blocks, int64_t columns);

  // scores [keys][kHeadLanes].
  void (*score_pairs)(const uint32_t* q, int64_t pairs, const uint16_t* rows, int64_t stride, int64_t keys,
                      float* scores);
  void (*score_codes)(const uint32_t* q, int64_t blocks, CodePage& page, int64_t row_bytes, float* scores);

  // exponents [kHeadLanes]: whole numbers, round(the largest score * scale_log2e + 1/2).
  void (*exponents)(const float* scores, int64_t keys, float scale_log2e, float* exponents);
  // The state's exponents to no less than these; where one rises, sum and weighted values follow.
  void (*raise)(const float* exponents, LatentState* state, float* weighted, int64_t columns);
  // words [pairs of keys][kHeadLanes] of 2^(score * scale_log2e - the state's exponent), added up in state.
  void (*weigh)(const float* scores, int64_t keys, float scale_log2e, LatentState* state, uint32_t* words);
  void (*add_values)(const uint32_t* words, int64_t keys, const uint32_t* values, int64_t columns,
                     float* weighted);
  // The same with the exponents of a page, which the state's are no less than. factors [kHeadLanes]: what a
  // product of words, shares and codes is to be multiplied with, but for the largest scale.
  void (*weigh_codes)(const float* scores, int64_t keys, float scale_log2e, const float* exponents,
                      LatentState* state, uint32_t* words, float* factors);
  // Values of pages times the weights of tiles of heads. are_first: weighted is not read, only written.
  void (*add_codes)(CodePage* pages, int64_t num_pages, int64_t row_bytes, const CodeSums* tiles,
                    int64_t num_tiles, int64_t columns, bool are_first);
  // Joins the softmax over other keys.
  void (*merge)(const LatentState& other, const float* other_weighted, LatentState* state, float* weighted,
                int64_t columns);
  // Weighted values of heads divided by their sums: out[head * stride + c] for c < count.
  void (*divide)(const LatentState& state, const float* weighted, int64_t heads, int64_t count, float* out,
                 int64_t stride);

  // For what is folded by columns. nullptr where the set has nothing faster than decode.h.
  DecodeWeights (*decode)(int32_t type);
  FoldColumns (*fold)(int32_t type);
};

}  // namespace kvfold
