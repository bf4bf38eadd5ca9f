#include "program.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>

#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/moe.h"
#include "kernels/rowwise.h"
#include "op_arguments.h"
#include "program_check.h"

namespace kvfold {
namespace {

int checked_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads: " + std::to_string(threads) + ", expected 1 to 1024.");
  }
  return threads;
}

int64_t checked_workspace(int64_t bytes, int threads, const ProgramFacts& facts) {
  const int64_t least = least_workspace(facts, threads, {});
  if (bytes < least) {
    throw WorkspaceTooSmall("workspace_bytes: " + std::to_string(bytes) + ", expected at least " +
                            std::to_string(least) + " for " + std::to_string(threads) +
                            " threads and this model: raise it, or use fewer threads.");
  }
  return bytes / 4;
}

Machine split_workspace(ThreadTeam& team, float* workspace, int64_t floats, const ProgramFacts& facts) {
  const int64_t member_floats = whole_lines(facts.member_floats), all = team.size() * member_floats;
  return {team, workspace, member_floats, workspace + all, floats - all, facts.rounds};
}

// The rows of a value from one on.
Matrix from(Matrix value, int64_t row) { return {value.row(row), value.stride, value.width}; }

Matrix matrix(const Value& value, const Segment& segment, const std::vector<float*>& buffers) {
  return {buffers[value.buffer] + value.start, segment.buffers[value.buffer].width, value.width};
}

}  // namespace

Floats::Floats(int64_t count)
    : data_(static_cast<float*>(
          ::operator new(std::max<int64_t>(count, 1) * sizeof(float), std::align_val_t{64}))) {}

Floats::~Floats() { ::operator delete(data_, std::align_val_t{64}); }

Program::Program(std::vector<Segment> segments, std::vector<Weight> weights, std::vector<CacheArray> cache,
                 int threads, int64_t workspace_bytes, ProgramOptions options)
    : segments_(std::move(segments)),
      weights_(std::move(weights)),
      cache_(std::move(cache)),
      facts_(check_program(segments_, weights_, cache_)),
      team_(checked_threads(threads)),
      workspace_(checked_workspace(workspace_bytes, threads, facts_)),
      machine_(split_workspace(team_, workspace_.data(), workspace_bytes / 4, facts_)),
      options_(options) {}

void Program::move_weights(const std::vector<MovedWeight>& moved) {
  const std::lock_guard<std::mutex> lock(running_);
  for (const MovedWeight& from : moved) {
    Weight& weight = weights_.at(from.handle);
    weight.type = from.type;
    weight.kernels = from.kernels;
    weight.parts = from.parts;
  }
}

void Program::run_op(const Op& op, const Segment& segment, const Step& step,
                     const std::vector<float*>& buffers) const {
  const Machine& machine = machine_;
  const auto in = [&](size_t i) { return matrix(op.inputs[i], segment, buffers); };
  const auto out = [&](size_t i) { return matrix(op.outputs[i], segment, buffers); };
  const auto weight = [&](size_t i) -> const Weight& { return weights_[op.weights[i]]; };
  const auto scale = [&] { return static_cast<float>(op.floats[0]); };
  // Ops on the rows of any domain but the absorbed one.
  const auto on_outputs = [&] { return segment.buffers[op.inputs[0].buffer].domain == Domain::kOutputs; };
  const auto rows = [&] { return on_outputs() ? step.num_outputs() : step.num_rows(); };
  // body(machine, first row, rows): once, or for neighbours of one role each in the form of that role.
  const auto by_role = [&](const auto& body) {
    if (!options_.by_role) return body(machine, 0, rows());
    for (const RoleRange& role : on_outputs() ? step.output_roles : step.roles) {
      const ProductForm form = role.is_prompt ? ProductForm::kTiles : ProductForm::kDots;
      Machine with_form = machine;
      with_form.form = form;
      body(with_form, role.first, role.last - role.first);
    }
  };
  // Ops whose rows may be of both roles: each goes alone.
  Machine alone = machine;
  if (options_.by_role) alone.form = ProductForm::kDots;
  switch (op.kind) {
    case OpKind::kEmbed:
      return embed(machine, step, weight(0), out(0));
    case OpKind::kNorm:
      return norm(machine, rows(), in(0), weight(0), static_cast<float>(op.floats[0]), out(0));
    case OpKind::kLinear:
      return by_role([&](const Machine& with_form, int64_t first, int64_t count) {
        linear(with_form, count, from(in(0), first), weight(0), from(out(0), first));
      });
    case OpKind::kRope:
      return rope(machine, step, in(0), op.ints[0], op.ints[2] != 0);
    case OpKind::kAppendLatent:
      return append_latent(machine, step, in(0), in(1), cache_[0], op.ints[0]);
    case OpKind::kFoldQ:
      return fold_q(alone, step, mla_dims(op), up_weights(op, weights_), in(0), out(0));
    case OpKind::kAttendLatent:
      return attend_latent(machine, step, mla_dims(op), scale(), cache_[0], op.ints[5], in(0), out(0));
    case OpKind::kUnfoldV:
      return unfold_v(alone, step, mla_dims(op), up_weights(op, weights_), in(0), out(0));
    case OpKind::kAttendExpanded:
      return attend_expanded(machine, step, mla_dims(op), up_weights(op, weights_), scale(), cache_[0],
                             op.ints[5], in(0), out(0));
    case OpKind::kAppendFull:
      return append_full(machine, step, mla_dims(op), up_weights(op, weights_), in(0), in(1), cache_[0],
                         cache_[1], op.ints[5]);
    case OpKind::kAttendFull:
      return attend_full(alone, step, mla_dims(op), scale(), cache_[0], cache_[1], op.ints[5], in(0), out(0));
    case OpKind::kSwiglu:
      return swiglu(machine, rows(), in(0), in(1), out(0));
    case OpKind::kAdd:
      return add(machine, rows(), in(0), in(1), out(0));
    case OpKind::kRoute:
      return by_role([&](const Machine& with_form, int64_t first, int64_t count) {
        route(with_form, count, from(in(0), first), weight(0), weight_or_null(op, 1, weights_), routing(op),
              from(out(0), first), from(out(1), first));
      });
    case OpKind::kExperts:
      return by_role([&](const Machine& with_form, int64_t first, int64_t count) {
        mix_experts(with_form, count, from(in(0), first), from(in(1), first), from(in(2), first),
                    experts_of(op, weights_), from(out(0), first));
      });
    case OpKind::kTakeOutputs:
      return take_outputs(machine, step, in(0), out(0));
  }
}

OpTime Program::run_watched(const Op& op, const Segment& segment, const Step& step,
                            const std::vector<float*>& buffers) const {
  using Clock = std::chrono::steady_clock;
  OpTime time;
  const Clock::time_point start = Clock::now();
  run_op(op, segment, step, buffers);
  time.ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();

  const auto rows_of = [&](const Value& value) -> std::pair<int64_t, int64_t> {
    if (op.kind == OpKind::kUnfoldV || op.kind == OpKind::kAttendExpanded) {  // these write their path's rows
      const Path path = op.kind == OpKind::kUnfoldV ? Path::kAbsorbed : Path::kDecompressed;
      return {step.range(path).first_row, step.range(path).last_row};
    }
    const Domain domain = segment.buffers[value.buffer].domain;
    if (domain == Domain::kAbsorbed) return {0, step.range(Path::kAbsorbed).num_rows()};
    return {0, domain == Domain::kOutputs ? step.num_outputs() : step.num_rows()};
  };
  if (options_.times_ops && op.kind == OpKind::kExperts) {
    time.experts = count_experts(experts_of(op, weights_), matrix(op.inputs[1], segment, buffers),
                                 rows_of(op.inputs[1]).second);
  }
  if (options_.checks_numerics) {
    for (size_t i = op.kind == OpKind::kRoute; i < op.outputs.size(); i++) {  // a route's first are ids
      const auto [first, last] = rows_of(op.outputs[i]);
      check_finite(op.name, matrix(op.outputs[i], segment, buffers), first, last);
    }
  }
  return time;
}

StepRun::StepRun(Program& program, Step step, const std::vector<PathSegment>& path_segments,
                 std::vector<float*> outputs)
    : program_(program),
      step_(complete_step(std::move(step), path_segments, program.facts_, program.cache_[0].num_pages)),
      outputs_(std::move(outputs)) {
  if (outputs_.size() != program.outputs().size()) {
    throw std::invalid_argument("outputs: " + std::to_string(outputs_.size()) + ", expected " +
                                std::to_string(program.outputs().size()) + ".");
  }
  check_attention_fits(program.machine_, step_, program.facts_.dims);
  int64_t arena_floats = 0;
  offsets_.resize(program.segments_.size());
  for (size_t i = 0; i < offsets_.size(); i++) {
    arena_floats = std::max(arena_floats, lay_out(program.segments_[i], offsets_[i]));
  }
  arena_ = std::make_unique<Floats>(arena_floats);
  const int64_t x_floats = step_.num_rows() * program.segments_[0].buffers[0].width;
  for (auto& hidden : hidden_) hidden = std::make_unique<Floats>(x_floats);
}

int64_t StepRun::rows_of(Domain domain) const {
  if (domain == Domain::kOutputs) return step_.num_outputs();
  return domain == Domain::kRows ? step_.num_rows() : step_.range(Path::kAbsorbed).num_rows();
}

// First fit, in the order of definition: each buffer at the lowest place that no buffer alive with it takes.
// x and the outputs have places of their own. Returns the floats taken.
int64_t StepRun::lay_out(const Segment& segment, std::vector<int64_t>& offsets) const {
  const size_t n = segment.buffers.size();
  const auto size = [&](size_t b) {
    return whole_lines(rows_of(segment.buffers[b].domain) * segment.buffers[b].width);
  };
  const auto elsewhere = [&](size_t b) {
    const auto index = static_cast<int32_t>(b);
    return index == 0 || index == segment.x_out.buffer ||
           std::any_of(segment.outputs.begin(), segment.outputs.end(),
                       [&](const auto& output) { return output.second.buffer == index; });
  };
  offsets.assign(n, -1);
  int64_t end = 0;
  std::vector<std::pair<int64_t, int64_t>> taken;  // [first, last) of those alive with b
  for (size_t b = 0; b < n; b++) {
    if (elsewhere(b)) continue;
    taken.clear();
    for (size_t other = 0; other < b; other++) {
      const Buffer &x = segment.buffers[b], &y = segment.buffers[other];
      if (offsets[other] >= 0 && x.first <= y.last && y.first <= x.last) {
        taken.emplace_back(offsets[other], offsets[other] + size(other));
      }
    }
    std::sort(taken.begin(), taken.end());
    int64_t at = 0;
    for (const auto& [first, last] : taken) {
      if (at + size(b) <= first) break;
      at = std::max(at, last);
    }
    offsets[b] = at;
    end = std::max(end, at + size(b));
  }
  return end;
}

void StepRun::run_segment(int32_t index) {
  const Segment& segment = program_.segments_[index];
  std::vector<float*> buffers(segment.buffers.size());
  for (size_t b = 0; b < buffers.size(); b++) {
    if (offsets_[index][b] >= 0) buffers[b] = arena_->data() + offsets_[index][b];
  }
  for (size_t i = 0; i < segment.outputs.size(); i++) buffers[segment.outputs[i].second.buffer] = outputs_[i];
  buffers[0] = hidden_[hidden_at_]->data();
  const bool new_x = segment.x_out.buffer > 0;
  if (new_x) buffers[segment.x_out.buffer] = hidden_[1 - hidden_at_]->data();
  if (program_.options_.watches()) {
    for (const Op& op : segment.ops) {
      op_times_.push_back(program_.run_watched(op, segment, step_, buffers));
    }
  } else {
    for (const Op& op : segment.ops) program_.run_op(op, segment, step_, buffers);
  }
  if (new_x) hidden_at_ = 1 - hidden_at_;
}

bool StepRun::run(int32_t last, const std::function<void()>& at_cut) {
  if (last < 0 || last > program_.num_segments()) {
    throw std::invalid_argument("last: " + std::to_string(last) + ", expected 0 to " +
                                std::to_string(program_.num_segments()) + ".");
  }
  const std::lock_guard<std::mutex> advancing(advancing_);
  while (position_.load() < last) {
    if (cancelled_.exchange(false)) return false;
    {
      const std::lock_guard<std::mutex> lock(program_.running_);
      run_segment(position_.load());
    }
    position_.fetch_add(1);
    at_cut();
  }
  return true;
}

}  // namespace kvfold
