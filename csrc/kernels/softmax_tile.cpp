#include "kernels/softmax_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/tile.h"

namespace kvfold {
namespace {

// How many of a block's keys query i sees.
int64_t seen(const QueryTile& tile, int64_t i, int64_t first_key, int64_t keys) {
  return std::clamp<int64_t>(tile.visible + i * tile.visible_step - first_key, 0, keys);
}

float largest(const float* scores, int64_t n) {
  float max = scores[0];
  for (int64_t j = 1; j < n; j++) max = std::max(max, scores[j]);
  return max;
}

// Scores to exp(scale * score - max); returns their sum.
float exponentials(float* scores, int64_t n, float scale, float max) {
  float sum = 0.0f;
  for (int64_t block = 0; block < n; block += kPageTokens) {  // one long float32 sum would lose digits
    float part = 0.0f;
    for (int64_t j = block; j < std::min(n, block + kPageTokens); j++) {
      scores[j] = std::exp(scores[j] * scale - max);
      part += scores[j];
    }
    sum += part;
  }
  return sum;
}

// Adds each query's weighted values of a block, over the keys it sees and no others: a key weighed with zero
// would still pass on a NaN.
void add_values(const QueryTile& tile, int64_t first_key, int64_t keys, const float* weights,
                int64_t weights_stride, Keys v, const ValueTile& out) {
  const int64_t least = seen(tile, 0, first_key, keys), most = seen(tile, tile.count - 1, first_key, keys);
  if (least == most) {
    tiles().nn(weights, weights_stride, tile.count, v.data, v.stride, out.width, most, out.data, out.stride);
    return;
  }
  for (int64_t i = 0; i < tile.count; i++) {
    tiles().nn(weights + i * weights_stride, 0, 1, v.data, v.stride, out.width,
               seen(tile, i, first_key, keys), out.data + i * out.stride, 0);
  }
}

}  // namespace

void start(const ValueTile& out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    std::memset(out.data + i * out.stride, 0, out.width * 4);
    out.states[i] = SoftmaxState{};
  }
}

void absorb_keys(const QueryTile& tile, int64_t first_key, int64_t keys, Keys k, Keys v, const ValueTile& out,
                 float* scores) {
  const int64_t most = seen(tile, tile.count - 1, first_key, keys);
  if (most == 0) return;
  tiles().nt(tile.q, tile.q_stride, nullptr, tile.count, k.data, k.stride, most, tile.dim, scores,
             kPageTokens);
  for (int64_t i = 0; i < tile.count; i++) {
    float* row = scores + i * kPageTokens;
    const int64_t n = seen(tile, i, first_key, keys);
    if (n > 0) {
      SoftmaxState& state = out.states[i];
      const float max = std::max(state.max, largest(row, n) * tile.scale);
      const float shrink = std::exp(state.max - max);
      state.max = max;
      state.sum = state.sum * shrink + exponentials(row, n, tile.scale, max);
      if (shrink != 1.0f) {
        float* values = out.data + i * out.stride;
        for (int64_t c = 0; c < out.width; c++) values[c] *= shrink;
      }
    }
  }
  add_values(tile, first_key, keys, scores, kPageTokens, v, out);
}

void merge(const ValueTile& other, const ValueTile& into, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    SoftmaxState &a = into.states[i], &b = other.states[i];
    const float max = std::max(a.max, b.max);
    const float shrink_a = std::exp(a.max - max), shrink_b = std::exp(b.max - max);
    a.max = max;
    a.sum = a.sum * shrink_a + b.sum * shrink_b;
    float* to = into.data + i * into.stride;
    const float* from = other.data + i * other.stride;
    for (int64_t c = 0; c < into.width; c++) to[c] = to[c] * shrink_a + from[c] * shrink_b;
  }
}

void finish(const ValueTile& out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    float* values = out.data + i * out.stride;
    for (int64_t c = 0; c < out.width; c++) values[c] /= out.states[i].sum;
  }
}

void store_scores(const QueryTile& tile, int64_t first_key, int64_t keys, Keys k, float* scores,
                  int64_t scores_stride) {
  const int64_t most = seen(tile, tile.count - 1, first_key, keys);
  if (most == 0) return;
  tiles().nt(tile.q, tile.q_stride, nullptr, tile.count, k.data, k.stride, most, tile.dim, scores + first_key,
             scores_stride);
}

void normalise_scores(const QueryTile& tile, float* scores, int64_t scores_stride) {
  for (int64_t i = 0; i < tile.count; i++) {
    float* row = scores + i * scores_stride;
    const int64_t n = tile.visible + i * tile.visible_step;
    const float sum = exponentials(row, n, tile.scale, largest(row, n) * tile.scale);
    for (int64_t j = 0; j < n; j++) row[j] /= sum;
  }
}

void weigh_values(const QueryTile& tile, int64_t first_key, int64_t keys, const float* weights,
                  int64_t weights_stride, Keys v, const ValueTile& out) {
  if (seen(tile, tile.count - 1, first_key, keys) == 0) return;
  add_values(tile, first_key, keys, weights + first_key, weights_stride, v, out);
}

}  // namespace kvfold
