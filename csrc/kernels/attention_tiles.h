// What the attention ops share: how work is cut into tiles of queries and blocks of keys.

#pragma once

#include <algorithm>

#include "kernels/mla_up.h"
#include "kernels/softmax_tile.h"
#include "kernels/step_view.h"

namespace kvfold {

constexpr int64_t kScoreFloats = kTileQueries * kPageTokens;
constexpr int64_t kStateFloats = kTileQueries * sizeof(SoftmaxState) / sizeof(float);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row's pages go in runs of this many, each with a softmax of its own; a function of the row's keys alone.
// 256 keys, or as many as keep the runs at 64: a unit is then at least 256 * 16 heads * 1088 = 4.5 M
// multiply-adds. More keys may be fewer runs: 256 pages are 64 runs of 4, 257 are 52 of 5.
inline int64_t run_keys(int64_t visible) {
  constexpr int64_t kMinPages = 4, kMaxRuns = 64;
  return std::max(kMinPages, ceil_div(ceil_div(visible, kPageTokens), kMaxRuns)) * kPageTokens;
}

inline SoftmaxState* states_at(float* memory) { return reinterpret_cast<SoftmaxState*>(memory); }

// Calls use(first_key, keys) for the pages' blocks of [first, last), `first` at a page.
template <typename Use>
void for_blocks(int64_t first, int64_t last, const Use& use) {
  for (int64_t key = first; key < last; key += kPageTokens) use(key, std::min(kPageTokens, last - key));
}

// Scores that a member may store without fusing.
inline int64_t stored_floats(const Machine& machine) { return machine.shared_floats / machine.team.size(); }

// Throws WorkspaceTooSmall where a sequence's smallest expanded tiles do not fit the shared space.
void check_expanded_fits(const Machine& machine, const MlaDims& dims, int64_t rows, int64_t keys, bool fused);

}  // namespace kvfold
