#include "program_check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/moe.h"
#include "op_arguments.h"

namespace kvfold {
namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& what) {
  throw std::invalid_argument(where + ": " + what + ".");
}

void expect(bool right, const std::string& where, const std::string& what) {
  if (!right) refuse(where, what);
}

void expect_equal(const std::string& where, const char* what, int64_t expected, int64_t got) {
  if (expected != got) {
    refuse(where,
           std::string(what) + " is " + std::to_string(got) + ", expected " + std::to_string(expected));
  }
}

// first <= got < end
void expect_within(const std::string& where, const char* what, int64_t first, int64_t end, int64_t got) {
  if (got < first || got >= end) {
    refuse(where, std::string(what) + " is " + std::to_string(got) + ", expected " + std::to_string(first) +
                      " to " + std::to_string(end - 1));
  }
}

void expect_shape(const std::string& where, const Weight& weight, int64_t rows, int64_t cols) {
  if (weight.rows() != rows || weight.cols != cols) {
    refuse(where, weight.name + " has shape (" + std::to_string(weight.rows()) + ", " +
                      std::to_string(weight.cols) + "), expected (" + std::to_string(rows) + ", " +
                      std::to_string(cols) + ")");
  }
}

void expect_gated(const std::string& where, const Gated& matrices, int64_t count, int64_t inner,
                  int64_t hidden) {
  expect_shape(where, matrices.gate, count * inner, hidden);
  expect_shape(where, matrices.up, count * inner, hidden);
  expect_shape(where, matrices.down, count * hidden, inner);
}

class ProgramChecker {
 public:
  ProgramChecker(const std::vector<Segment>& segments, const std::vector<Weight>& weights,
                 const std::vector<CacheArray>& cache)
      : segments_(segments), weights_(weights), cache_(cache) {}

  ProgramFacts check() {
    expect(!segments_.empty(), "program", "no segments, expected at least one");
    for (const Weight& weight : weights_) check_weight(weight);
    expect(!cache_.empty(), "cache", "no arrays, expected one of latents or two of keys and values");
    for (const CacheArray& array : cache_) {
      expect_equal("cache", "number of pages of an array", cache_[0].num_pages, array.num_pages);
      expect_equal("cache", "number of layers of an array", cache_[0].num_layers, array.num_layers);
      expect(array.width > 0, "cache", "an array of no columns");
    }
    Domain x = Domain::kRows;
    for (size_t i = 0; i < segments_.size(); i++) {
      check_segment(segments_[i], x, i + 1 == segments_.size());
      if (i + 1 < segments_.size()) x = buffer_of(segments_[i].x_out).domain;
    }
    expect(facts_.dims.heads > 0, "program", "no attention");
    expect(facts_.vocab_size > 0, "program", "no embedding");
    return facts_;
  }

 private:
  void check_weight(const Weight& weight) {
    facts_.rounds |= weight.kernels != nullptr;
    expect(weight.type != nullptr && !weight.parts.empty() && weight.part_rows > 0 && weight.cols > 0,
           weight.name, "no rows, no columns or no decoder");
    expect_equal(weight.name, "columns modulo the block of its type", 0,
                 weight.cols % weight.type->block_elements);
    expect_equal(weight.name, "rows modulo the rows its type interleaves", 0,
                 weight.part_rows % weight.type->interleaved_rows);
  }

  // x: which rows arrive with it.
  void check_segment(const Segment& segment, Domain x, bool is_last) {
    segment_ = &segment;
    const auto num_ops = static_cast<int32_t>(segment.ops.size());
    expect(!segment.buffers.empty(), segment.name, "no buffers, expected x");
    expect(segment.buffers[0].domain == x, segment.name,
           "x is not of the rows that the segment before hands over");
    expect_equal(segment.name, "width of x", segments_[0].buffers[0].width, segment.buffers[0].width);
    for (const Buffer& buffer : segment.buffers) {
      expect(buffer.width > 0 && -1 <= buffer.first && buffer.first <= buffer.last && buffer.last <= num_ops,
             segment.name, "a buffer of no width or with a life outside of the segment");
    }
    for (index_ = 0; index_ < num_ops; index_++) check_op(segment.ops[index_]);

    expect(is_last == (segment.x_out.buffer < 0), segment.name,
           is_last ? "the last segment hands x over" : "hands no x over to the next segment");
    if (!is_last) {
      index_ = num_ops;
      const Domain domain = domain_of(segment.name, segment.x_out);
      expect(domain != Domain::kAbsorbed, segment.name, "hands over the rows of one path alone");
      check_value(segment.name, segment.x_out, domain);
      expect_whole(segment.name, segment.x_out);
      expect_equal(segment.name, "width of x at the end", segment.buffers[0].width, segment.x_out.width);
    }
    expect(is_last || segment.outputs.empty(), segment.name, "outputs before the last segment");
    for (const auto& [name, value] : segment.outputs) {
      index_ = num_ops;
      check_value(name, value, Domain::kOutputs);
      expect_whole(name, value);
      facts_.outputs.push_back({name, value.width});
    }
  }

  const Buffer& buffer_of(const Value& value) const { return segment_->buffers[value.buffer]; }

  // In bounds, alive at the present op, and of the domain.
  void check_value(const std::string& where, const Value& value, Domain domain) const {
    expect_within(where, "buffer", 0, static_cast<int64_t>(segment_->buffers.size()), value.buffer);
    const Buffer& buffer = buffer_of(value);
    expect(value.start >= 0 && value.width > 0 && value.start + value.width <= buffer.width, where,
           "columns " + std::to_string(value.start) + " to " + std::to_string(value.start + value.width) +
               " of a buffer of " + std::to_string(buffer.width));
    expect(buffer.first <= index_ && index_ <= buffer.last, where, "a buffer that is not alive");
    expect_equal(where, "domain of a buffer", static_cast<int64_t>(domain),
                 static_cast<int64_t>(buffer.domain));
  }

  void expect_whole(const std::string& where, const Value& value) const {
    expect_equal(where, "first column", 0, value.start);
    expect_equal(where, "columns", buffer_of(value).width, value.width);
  }

  // Counts, domains and widths. `width` 0: any.
  struct Expected {
    Domain domain;
    int64_t width;
  };
  void expect_values(const Op& op, const char* what, const std::vector<Value>& values,
                     const std::vector<Expected>& expected) const {
    expect_equal(op.name, what, static_cast<int64_t>(expected.size()), static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); i++) {
      check_value(op.name, values[i], expected[i].domain);
      if (expected[i].width) expect_equal(op.name, "width of a value", expected[i].width, values[i].width);
    }
  }
  void expect_inputs(const Op& op, const std::vector<Expected>& expected) const {
    expect_values(op, "number of inputs", op.inputs, expected);
  }
  void expect_outputs(const Op& op, const std::vector<Expected>& expected) const {
    expect_values(op, "number of outputs", op.outputs, expected);
  }
  void expect_constants(const Op& op, size_t weights, size_t ints, size_t floats) const {
    expect_equal(op.name, "number of weights", static_cast<int64_t>(weights),
                 static_cast<int64_t>(op.weights.size()));
    expect_equal(op.name, "number of ints", static_cast<int64_t>(ints), static_cast<int64_t>(op.ints.size()));
    expect_equal(op.name, "number of floats", static_cast<int64_t>(floats),
                 static_cast<int64_t>(op.floats.size()));
    for (const int32_t handle : op.weights) {
      expect_within(op.name, "weight handle", -1, static_cast<int64_t>(weights_.size()), handle);
    }
  }
  Domain domain_of(const std::string& where, const Value& value) const {
    expect_within(where, "buffer", 0, static_cast<int64_t>(segment_->buffers.size()), value.buffer);
    return buffer_of(value).domain;
  }
  // The domain of an op's first input, for ops that work on the rows of any.
  Domain domain_of(const Op& op) const {
    expect(!op.inputs.empty(), op.name, "no inputs");
    return domain_of(op.name, op.inputs[0]);
  }

  const Weight& weight(const Op& op, size_t i) const {
    expect(op.weights[i] >= 0, op.name, "an absent weight");
    return weights_[op.weights[i]];
  }

  void need(int64_t member_floats, int64_t shared_floats) {
    facts_.member_floats = std::max(facts_.member_floats, member_floats);
    facts_.shared_floats = std::max(facts_.shared_floats, shared_floats);
  }

  MlaDims dims(const Op& op) {
    const MlaDims dims = mla_dims(op);
    expect(dims.heads > 0 && dims.nope > 0 && dims.rope > 0 && dims.v > 0 && dims.kv_lora > 0, op.name,
           "a dimension of attention below 1");
    const MlaDims& first = facts_.dims;
    expect(
        first.heads == 0 || (first.heads == dims.heads && first.nope == dims.nope &&
                             first.rope == dims.rope && first.v == dims.v && first.kv_lora == dims.kv_lora),
        op.name, "other dimensions of attention than the ops before");
    facts_.dims = dims;
    return dims;
  }

  KvUp kv_up(const Op& op, const MlaDims& dims) const {
    const bool one = op.weights[0] >= 0 && op.weights[1] < 0 && op.weights[2] < 0;
    const bool two = op.weights[0] < 0 && op.weights[1] >= 0 && op.weights[2] >= 0;
    expect(one || two, op.name, "neither kv_b nor k_b and v_b");
    const KvUp up = up_weights(op, weights_);
    if (one) {
      expect_shape(op.name, *up.kv_b, dims.heads * (dims.nope + dims.v), dims.kv_lora);
    } else {
      expect_shape(op.name, *up.k_b, dims.heads * dims.kv_lora, dims.nope);
      expect_shape(op.name, *up.v_b, dims.heads * dims.v, dims.kv_lora);
    }
    return up;
  }

  void check_cache(const Op& op, const std::vector<int64_t>& widths, int64_t layer) {
    expect_equal(op.name, "number of cache arrays", static_cast<int64_t>(widths.size()),
                 static_cast<int64_t>(cache_.size()));
    for (size_t i = 0; i < widths.size(); i++) {
      expect_equal(op.name, "columns of a cache array", widths[i], cache_[i].width);
    }
    expect_within(op.name, "layer", 0, cache_[0].num_layers, layer);
    facts_.standard = widths.size() == 2;
  }

  static void expect_scale(const Op& op) { expect(op.floats[0] > 0.0, op.name, "softmax scale not above 0"); }

  void check_op(const Op& op) {
    constexpr Domain kRows = Domain::kRows, kAbsorbed = Domain::kAbsorbed;
    switch (op.kind) {
      case OpKind::kEmbed: {
        expect_constants(op, 1, 0, 0);
        const Weight& table = weight(op, 0);
        expect_inputs(op, {});
        expect_outputs(op, {{kRows, table.cols}});
        facts_.vocab_size = table.rows();
        break;
      }
      case OpKind::kNorm: {
        expect_constants(op, 1, 0, 1);
        const Domain domain = domain_of(op);
        expect_inputs(op, {{domain, 0}});
        expect_outputs(op, {{domain, op.inputs[0].width}});
        expect_shape(op.name, weight(op, 0), 1, op.inputs[0].width);
        need(0, op.inputs[0].width);
        break;
      }
      case OpKind::kLinear: {
        expect_constants(op, 1, 0, 0);
        const Domain domain = domain_of(op);
        expect_inputs(op, {{domain, 0}});
        expect_outputs(op, {{domain, 0}});
        expect_shape(op.name, weight(op, 0), op.outputs[0].width, op.inputs[0].width);
        need(linear_floats(weight(op, 0)), linear_shared_floats(weight(op, 0)));
        break;
      }
      case OpKind::kRope: {
        expect_constants(op, 0, 3, 0);
        expect_inputs(op, {{kRows, 0}});
        expect_outputs(op, {{kRows, op.inputs[0].width}});
        expect(op.inputs[0].buffer == op.outputs[0].buffer && op.inputs[0].start == op.outputs[0].start,
               op.name, "rope not in place");
        const int64_t head_dim = op.ints[0], dim = op.ints[1];
        expect(dim > 0 && dim % 2 == 0 && dim <= head_dim, op.name,
               std::to_string(dim) + " rotated numbers of heads of " + std::to_string(head_dim));
        expect_equal(op.name, "width modulo the head", 0, op.inputs[0].width % head_dim);
        if (facts_.num_pairs > 0) expect_equal(op.name, "rotated numbers", 2 * facts_.num_pairs, dim);
        facts_.num_pairs = dim / 2;
        break;
      }
      case OpKind::kAppendLatent: {
        expect_constants(op, 0, 1, 0);
        expect_inputs(op, {{kRows, 0}, {kRows, 0}});
        expect_outputs(op, {});
        check_cache(op, {op.inputs[0].width + op.inputs[1].width}, op.ints[0]);
        break;
      }
      case OpKind::kFoldQ: {
        expect_constants(op, 3, 5, 0);
        const MlaDims d = dims(op);
        expect_inputs(op, {{kRows, d.heads * d.qk()}});
        expect_outputs(op, {{kAbsorbed, d.heads * d.latent()}});
        need(fold_floats(kv_up(op, d)), 0);
        break;
      }
      case OpKind::kAttendLatent: {
        expect_constants(op, 0, 6, 1);
        const MlaDims d = dims(op);
        expect_inputs(op, {{kAbsorbed, d.heads * d.latent()}});
        expect_outputs(op, {{kAbsorbed, d.heads * d.kv_lora}});
        check_cache(op, {d.latent()}, op.ints[5]);
        expect_scale(op);
        need(attend_latent_floats(d, facts_.rounds), 0);
        break;
      }
      case OpKind::kUnfoldV: {
        expect_constants(op, 3, 5, 0);
        const MlaDims d = dims(op);
        expect_inputs(op, {{kAbsorbed, d.heads * d.kv_lora}});
        expect_outputs(op, {{kRows, d.heads * d.v}});
        need(fold_floats(kv_up(op, d)), 0);
        break;
      }
      case OpKind::kAttendExpanded: {
        expect_constants(op, 3, 6, 1);
        const MlaDims d = dims(op);
        expect_inputs(op, {{kRows, d.heads * d.qk()}});
        expect_outputs(op, {{kRows, d.heads * d.v}});
        check_cache(op, {d.latent()}, op.ints[5]);
        expect_scale(op);
        need(attend_expanded_floats(d, kv_up(op, d), facts_.rounds), 0);
        break;
      }
      case OpKind::kAppendFull: {
        expect_constants(op, 3, 6, 0);
        const MlaDims d = dims(op);
        expect_inputs(op, {{kRows, d.kv_lora}, {kRows, d.rope}});
        expect_outputs(op, {});
        check_cache(op, {d.heads * d.qk(), d.heads * d.v}, op.ints[5]);
        const KvUp up = kv_up(op, d);
        need(append_full_floats(d, up, facts_.rounds), append_full_shared_floats(d, facts_.rounds));
        break;
      }
      case OpKind::kAttendFull: {
        expect_constants(op, 0, 6, 1);
        const MlaDims d = dims(op);
        expect_inputs(op, {{kRows, d.heads * d.qk()}});
        expect_outputs(op, {{kRows, d.heads * d.v}});
        check_cache(op, {d.heads * d.qk(), d.heads * d.v}, op.ints[5]);
        expect_scale(op);
        need(attend_full_floats(d, facts_.rounds), 0);
        break;
      }
      case OpKind::kSwiglu:
      case OpKind::kAdd: {
        expect_constants(op, 0, 0, 0);
        const Domain domain = domain_of(op);
        const int64_t width = op.inputs[0].width;
        expect_inputs(op, {{domain, width}, {domain, width}});
        expect_outputs(op, {{domain, width}});
        break;
      }
      case OpKind::kRoute: {
        expect_constants(op, 2, 7, 1);
        const Routing r = routing(op);
        expect(0 < r.per_token && r.per_token <= r.num_experts, op.name,
               std::to_string(r.per_token) + " experts a token of " + std::to_string(r.num_experts));
        expect(
            0 < r.groups_per_token && r.groups_per_token <= r.num_groups && r.num_experts % r.num_groups == 0,
            op.name,
            std::to_string(r.groups_per_token) + " groups a token of " + std::to_string(r.num_groups));
        expect(!r.top2_sum || r.num_groups == 1 || r.num_experts / r.num_groups >= 2, op.name,
               "groups of one expert have no best two");
        const Domain domain = domain_of(op);
        expect_inputs(op, {{domain, 0}});
        expect_outputs(op, {{domain, r.per_token}, {domain, r.per_token}});
        expect_shape(op.name, weight(op, 0), r.num_experts, op.inputs[0].width);
        if (op.weights[1] >= 0) expect_shape(op.name, weight(op, 1), 1, r.num_experts);
        need(route_floats(weight(op, 0), r), route_shared_floats(weight(op, 0), r));
        break;
      }
      case OpKind::kExperts: {
        expect_constants(op, 6, op.ints.size(), 0);
        const Domain domain = domain_of(op);
        const int64_t hidden = op.inputs[0].width;
        expect_inputs(op, {{domain, hidden}, {domain, 0}, {domain, 0}});
        expect_outputs(op, {{domain, hidden}});
        // Ids are not checked row by row: they must come straight from the op that makes them.
        const int32_t made_by = buffer_of(op.inputs[1]).first;
        const Op* choice = 0 <= made_by && made_by < index_ ? &segment_->ops[made_by] : nullptr;
        expect(choice != nullptr && choice->kind == OpKind::kRoute &&
                   choice->outputs[0].buffer == op.inputs[1].buffer &&
                   choice->outputs[1].buffer == op.inputs[2].buffer,
               op.name, "ids and weights that are not those of a route op");
        const int64_t count = routing(*choice).num_experts;
        expect_equal(op.name, "rows of all experts' down", count * hidden, weight(op, 2).rows());
        expect_equal(op.name, "rows of all experts' gate modulo the experts", 0,
                     weight(op, 0).rows() % count);
        const bool has_shared = op.weights[3] >= 0;
        for (size_t i = 1; i < op.weights.size(); i++) {
          const bool is_wanted = i < 3 || has_shared;
          expect((op.weights[i] >= 0) == is_wanted, op.name,
                 is_wanted ? "an absent weight" : "shared experts without gate");
        }
        const Experts experts = experts_of(op, weights_);
        expect_gated(op.name, experts.routed, count, experts.inner(), hidden);
        if (experts.shared) expect_gated(op.name, *experts.shared, 1, experts.shared_inner(), hidden);
        if (experts.subset) {
          for (size_t i = 0; i < op.ints.size(); i++) {
            expect_within(op.name, "an expert", i > 0 ? op.ints[i - 1] + 1 : 0, count, op.ints[i]);
          }
        }
        need(experts_floats(experts), experts_shared_floats(experts, op.inputs[1].width));
        break;
      }
      case OpKind::kTakeOutputs: {
        expect_constants(op, 0, 0, 0);
        expect_inputs(op, {{kRows, 0}});
        expect_outputs(op, {{Domain::kOutputs, op.inputs[0].width}});
        break;
      }
    }
  }

  const std::vector<Segment>& segments_;
  const std::vector<Weight>& weights_;
  const std::vector<CacheArray>& cache_;
  const Segment* segment_ = nullptr;
  int32_t index_ = 0;  // of the op
  ProgramFacts facts_;
};

// starts [n + 1]: 0 .. end, rising. `least`: smallest difference.
void expect_starts(const char* what, const std::vector<int32_t>& starts, int64_t n, int64_t end,
                   int32_t least) {
  expect_equal(what, "length", n + 1, static_cast<int64_t>(starts.size()));
  expect_equal(what, "first entry", 0, starts.front());
  expect_equal(what, "last entry", end, starts.back());
  for (int64_t i = 0; i < n; i++) {
    expect(starts[i + 1] - static_cast<int64_t>(starts[i]) >= least, what,
           "entry " + std::to_string(i + 1) + " is " + std::to_string(starts[i + 1]) + " after " +
               std::to_string(starts[i]));
  }
}

// Row i to the ranges, which end before it.
void add_role(std::vector<RoleRange>& roles, int64_t i, bool is_prompt) {
  if (roles.empty() || roles.back().is_prompt != is_prompt) roles.push_back({is_prompt, i, i});
  roles.back().last = i + 1;
}

template <typename Int>
void expect_all_within(const char* what, const std::vector<Int>& numbers, int64_t end) {
  for (const Int number : numbers) expect_within(what, "an entry", 0, end, number);
}

}  // namespace

int64_t least_workspace(const ProgramFacts& facts, int threads, const std::vector<PathKeys>& sequences) {
  int64_t shared = facts.shared_floats;
  for (const PathKeys& its : sequences) {
    shared =
        std::max(shared, attention_shared_floats(facts.dims, facts.rounds, its.path, its.fused, its.keys));
  }
  return 4 * (threads * whole_lines(facts.member_floats) + shared);
}

ProgramFacts check_program(const std::vector<Segment>& segments, const std::vector<Weight>& weights,
                           const std::vector<CacheArray>& cache) {
  return ProgramChecker(segments, weights, cache).check();
}

Step complete_step(Step step, const std::vector<PathSegment>& path_segments, const ProgramFacts& facts,
                   int64_t num_pages) {
  const int64_t rows = step.num_rows(), sequences = static_cast<int64_t>(step.kv_lens.size());
  expect(rows > 0, "token_ids", "no rows, expected at least one");
  expect_all_within("token_ids", step.token_ids, facts.vocab_size);
  expect_equal("slots", "length", rows, static_cast<int64_t>(step.slots.size()));
  expect_all_within("slots", step.slots, num_pages * kPageTokens);
  expect_all_within("pages", step.pages, num_pages);
  expect_all_within("output_rows", step.output_rows, rows);
  expect_starts("row_starts", step.row_starts, sequences, rows, 1);
  expect_starts("page_starts", step.page_starts, sequences, static_cast<int64_t>(step.pages.size()), 0);
  expect_equal("cos", "length", rows * facts.num_pairs, static_cast<int64_t>(step.cos.size()));
  expect_equal("sin", "length", rows * facts.num_pairs, static_cast<int64_t>(step.sin.size()));
  expect_equal("is_prompt", "length", sequences, static_cast<int64_t>(step.is_prompt.size()));
  expect_all_within("is_prompt", step.is_prompt, 2);
  step.num_pairs = facts.num_pairs;

  step.sequence_of.resize(rows);
  step.visible.resize(rows);
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t new_rows = step.row_starts[s + 1] - step.row_starts[s];
    const int64_t pages = step.page_starts[s + 1] - step.page_starts[s];
    const std::string where = "kv_lens of sequence " + std::to_string(s);
    expect_within(where, "keys", new_rows, pages * kPageTokens + 1, step.kv_lens[s]);
    for (int64_t i = 0; i < new_rows; i++) {
      step.sequence_of[step.row_starts[s] + i] = static_cast<int32_t>(s);
      step.visible[step.row_starts[s] + i] = step.kv_lens[s] - new_rows + i + 1;
      add_role(step.roles, step.row_starts[s] + i, step.is_prompt[s] == 1);
    }
  }
  for (int64_t i = 0; i < step.num_outputs(); i++) {
    add_role(step.output_roles, i, step.is_prompt[step.sequence_of[step.output_rows[i]]] == 1);
  }

  int64_t next = 0;
  for (const PathSegment& segment : path_segments) {
    const bool fits = facts.standard ? segment.path == 0 : segment.path == 1 || segment.path == 2;
    expect(fits, "segments",
           "path " + std::to_string(segment.path) + ", expected " + (facts.standard ? "0" : "1 or 2") +
               " for this cache");
    expect(segment.fused == 0 || segment.fused == 1, "segments", "fused is neither 0 nor 1");
    expect_equal("segments", "first sequence", next, segment.first);
    expect_within("segments", "last sequence + 1", next + 1, sequences + 1, segment.last);
    next = segment.last;
    PathRange& range = step.ranges[segment.path];
    expect(range.num_rows() == 0, "segments",
           "path " + std::to_string(segment.path) + " twice, expected once");
    range = {segment.fused == 1, segment.first, segment.last, step.row_starts[segment.first],
             step.row_starts[segment.last]};
  }
  expect_equal("segments", "sequences covered", sequences, next);
  return step;
}

}  // namespace kvfold
