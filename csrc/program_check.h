// Every shape, handle and width of a Program and of a step, checked before a kernel sees it.

#pragma once

#include <vector>

#include "kernels/cache_rows.h"
#include "kernels/mla_up.h"
#include "kernels/step_view.h"
#include "kernels/weights.h"
#include "recording.h"

namespace kvfold {

// What the ops of a program agree on and need.
struct ProgramFacts {
  MlaDims dims{};
  bool standard = false;  // its cache holds per-head K and V (mla=0)
  int64_t num_pairs = 0;  // of every rope op
  int64_t vocab_size = 0;
  std::vector<OutputSpec> outputs;
  bool rounds = false;        // weights have kernels that round activations
  int64_t member_floats = 0;  // scratch of one member
  int64_t shared_floats = 0;  // least shared space, before any step is known
};

// Sequences whose rows take a path.
struct PathKeys {
  Path path;
  bool fused;
  int64_t keys;  // of the longest
};

// Bytes of workspace with which so many members run every op, and attention over such sequences.
int64_t least_workspace(const ProgramFacts& facts, int threads, const std::vector<PathKeys>& sequences);

// Throws std::invalid_argument with op, expected and got.
ProgramFacts check_program(const std::vector<Segment>& segments, const std::vector<Weight>& weights,
                           const std::vector<CacheArray>& cache);

// The step with its derived fields filled in. Throws std::invalid_argument with array, expected and got.
Step complete_step(Step step, const std::vector<PathSegment>& path_segments, const ProgramFacts& facts,
                   int64_t num_pages);

}  // namespace kvfold
