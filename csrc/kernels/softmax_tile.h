// Attention on tiles: a few queries that share keys, and the softmax over all their keys in one of two forms.
//
//   fused    keys arrive in blocks of at most kPageTokens; a running maximum, sum and weighted values go
//   along unfused  all scores of a query are stored, then normalised in two passes, then weigh the values
//
// Which keys stand in a block follows from the sequence alone (pages start at multiples of kPageTokens), so a
// row's bits depend on no other row. Keys a query does not see are never read into its result.

#pragma once

#include <cstdint>
#include <limits>

#include "kernels/cache_rows.h"

namespace kvfold {

// Rows, or heads, computed together: enough to reuse a block of keys from cache.
constexpr int64_t kTileQueries = 16;

struct SoftmaxState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
};

// Up to kTileQueries queries. Query i sees the first visible + i * visible_step keys of its sequence.
struct QueryTile {
  const float* q;  // [count, dim]
  int64_t q_stride;
  int64_t count;
  int64_t dim;
  int64_t visible;
  int64_t visible_step;  // 1: consecutive rows of a sequence; 0: heads of one row
  float scale;

  int64_t most_visible() const { return visible + (count - 1) * visible_step; }
};

// Weighted values of a tile, not yet divided by the sums.
struct ValueTile {
  float* data;  // [count, width]
  int64_t stride;
  int64_t width;
  SoftmaxState* states;  // [count]
};

// Zeros, and states of no key.
void start(const ValueTile& out, int64_t count);

// Fused: one block of keys [first_key, first_key + keys) of the sequence. scores: kTileQueries * kPageTokens
// floats.
void absorb_keys(const QueryTile& tile, int64_t first_key, int64_t keys, Keys k, Keys v, const ValueTile& out,
                 float* scores);

// Joins softmax over other keys: `other` joins `into`.
void merge(const ValueTile& other, const ValueTile& into, int64_t count);

// Divides by the sums.
void finish(const ValueTile& out, int64_t count);

// Unfused, first: scores of a block, query i's to scores[i * scores_stride + first_key ...].
void store_scores(const QueryTile& tile, int64_t first_key, int64_t keys, Keys k, float* scores,
                  int64_t scores_stride);

// Second: scores of all keys that a query sees to weights that sum to one.
void normalise_scores(const QueryTile& tile, float* scores, int64_t scores_stride);

// Third: adds the weighted values of a block.
void weigh_values(const QueryTile& tile, int64_t first_key, int64_t keys, const float* weights,
                  int64_t weights_stride, Keys v, const ValueTile& out);

}  // namespace kvfold
