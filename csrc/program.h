// Walks a recording step by step: lays buffers out, runs ops in order, stops at cuts.
//
// The arithmetic is in kernels/. Knows nothing of Python: whoever builds a Program keeps weights, cache and
// outputs alive while it is used.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cache_rows.h"
#include "kernels/step_view.h"
#include "kernels/weights.h"
#include "program_check.h"
#include "recording.h"
#include "thread_team.h"
#include "watch.h"

namespace kvfold {

// 64-byte aligned numbers that are not written before they are used.
class Floats {
 public:
  explicit Floats(int64_t count);
  ~Floats();
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

class StepRun;

struct MovedWeight {
  int32_t handle;
  const TypeLayout* type;
  const MatrixKernels*
      kernels;  // null where there were none; else their prepared rows are those of the old ones
  std::vector<WeightPart> parts;
};

// by_role: forms of products follow the role of a row, so its bits depend on nothing beside it.
// checks_numerics: every value an op makes is searched for NaN and infinity. times_ops: StepRun::op_times().
struct ProgramOptions {
  bool by_role = false, checks_numerics = false, times_ops = false;

  bool watches() const { return checks_numerics || times_ops; }
};

// One model over one cache. Any number of StepRuns may be under way; their segments run one at a time.
class Program {
 public:
  // Throws std::invalid_argument where the parts do not fit each other, WorkspaceTooSmall where the smallest
  // tiles of an op do not fit `workspace_bytes`.
  Program(std::vector<Segment> segments, std::vector<Weight> weights, std::vector<CacheArray> cache,
          int threads, int64_t workspace_bytes, ProgramOptions options);

  // The same weights elsewhere in memory, in other order perhaps (kernels/side_by_side.h), all of them from
  // the next cut on; returns when no op uses the old places any more.
  void move_weights(const std::vector<MovedWeight>& moved);

  const std::vector<Weight>& weights() const { return weights_; }
  const ThreadTeam& team() const { return team_; }
  int32_t num_segments() const { return static_cast<int32_t>(segments_.size()); }
  const std::vector<OutputSpec>& outputs() const { return facts_.outputs; }

 private:
  friend class StepRun;

  void run_op(const Op& op, const Segment& segment, const Step& step,
              const std::vector<float*>& buffers) const;
  OpTime run_watched(const Op& op, const Segment& segment, const Step& step,
                     const std::vector<float*>& buffers) const;

  std::vector<Segment> segments_;
  std::vector<Weight> weights_;
  std::vector<CacheArray> cache_;
  const ProgramFacts facts_;
  ThreadTeam team_;
  Floats workspace_;
  const Machine machine_;
  const ProgramOptions options_;
  std::mutex running_;  // held while a segment runs or a weight moves
};

// One step under way. Hidden rows stay in its own memory between cuts.
class StepRun {
 public:
  // `step` as its arrays say, without what follows from them. `outputs`: where each of program.outputs()
  // goes, [R, width]. Throws std::invalid_argument where the arrays are inconsistent or point outside of the
  // cache or the vocabulary, WorkspaceTooSmall where a sequence is too long for the workspace.
  StepRun(Program& program, Step step, const std::vector<PathSegment>& path_segments,
          std::vector<float*> outputs);

  // Runs segments up to cut `last`. False: stopped at a cut because of cancel(); may go on afterwards.
  // at_cut() is called after every segment, and what it throws stops the run as well. Throws NotFinite.
  bool run(int32_t last, const std::function<void()>& at_cut);
  void cancel() { cancelled_.store(true); }
  int32_t position() const { return position_.load(); }
  // Of every op that ran, in order; empty where the program does not time them.
  const std::vector<OpTime>& op_times() const { return op_times_; }

 private:
  int64_t rows_of(Domain domain) const;
  int64_t lay_out(const Segment& segment, std::vector<int64_t>& offsets) const;
  void run_segment(int32_t index);

  Program& program_;
  const Step step_;
  const std::vector<float*> outputs_;
  std::vector<std::vector<int64_t>>
      offsets_;                        // by segment and buffer: where in arena_; -1 for those elsewhere
  std::unique_ptr<Floats> hidden_[2];  // x before a segment and after it, in turn
  std::unique_ptr<Floats> arena_;
  std::vector<OpTime> op_times_;
  int hidden_at_ = 0;  // which of them holds x at the present cut
  std::atomic<int32_t> position_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex advancing_;
};

}  // namespace kvfold
