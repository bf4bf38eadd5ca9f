// Routed experts: who computes a row, and the sum of what they say.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/step_view.h"
#include "kernels/weights.h"

namespace kvfold {

// config.py: MoeConfig, as far as choosing goes.
struct Routing {
  int64_t num_experts, per_token, num_groups, groups_per_token;
  bool sigmoid;    // scores are sigmoids (V3) or a softmax (V2) of the logits
  bool top2_sum;   // a group ranks by the sum of its best two (V3) or by its best (V2)
  bool norm_topk;  // weights are divided by their sum
  float scaling;
};

// x [rows, hidden], weight [E, hidden], bias [E] or null -> ids int32 [rows, k], weights [rows, k]. Equal
// scores: the lower id. NaN among a row's scores, the bias added: NaN weights, so no choice is made in
// silence. Scratch: route_floats. Shared: at least route_shared_floats.
void route(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, const Weight* bias,
           const Routing& routing, Matrix ids, Matrix weights);
int64_t route_floats(const Weight& weight, const Routing& routing);
int64_t route_shared_floats(const Weight& weight, const Routing& routing);

// A gated network, down(silu(gate x) * up x), or equal ones below each other.
struct Gated {
  const Weight& gate;  // [networks * inner, hidden], and so is up
  const Weight& up;
  const Weight& down;  // [networks * hidden, inner]
};

// Experts of one layer, and the shared ones beside them: one network that every row passes, of another width
// and other types perhaps.
struct Experts {
  Gated routed;
  int64_t count;                       // in the layer
  const std::vector<int64_t>* subset;  // ids of those that take part, ascending; null: every one
  std::optional<Gated> shared;

  bool takes_part(int64_t e) const {
    return subset == nullptr || std::binary_search(subset->begin(), subset->end(), e);
  }

  int64_t inner() const { return routed.gate.rows() / count; }
  int64_t shared_inner() const { return shared ? shared->gate.rows() : 0; }
  int64_t hidden() const { return routed.gate.cols; }
  int64_t most_groups() const { return count + (shared ? 1 : 0); }
};

// One network and the rows of a window that pass it.
struct RowGroup {
  const Gated& matrices;
  bool is_shared;
  int64_t inner;
  int64_t gate_row, down_row;  // where its own begin in the matrices
  int64_t num_rows;
  const int32_t* rows;   // [num_rows] of the window, ascending; null: all of them
  const float* weights;  // [num_rows]; null: ones
  int64_t inner_at;      // floats before its [num_rows, inner] in what holds the activations of all groups

  int64_t row(int64_t i) const { return rows ? rows[i] : i; }
  float weight(int64_t i) const { return weights ? weights[i] : 1.0f; }
};

// The groups of a window of rows: the shared experts with every row, then experts that were chosen,
// ascending.
class RowGroups {
 public:
  // Of rows [first, first + n), n <= window. memory: fixed_numbers, and per_row for each row of a window.
  RowGroups(const Experts& experts, Matrix ids, Matrix weights, int64_t first, int64_t n, int64_t window,
            int32_t* memory);
  static int64_t fixed_numbers(const Experts& experts) { return 2 * experts.count + 1; }
  static int64_t per_row(int64_t per_token) { return 2 * per_token; }

  int64_t size() const { return num_chosen_ + num_shared(); }
  RowGroup operator[](int64_t group) const;

 private:
  int64_t num_shared() const { return experts_.shared ? 1 : 0; }

  const Experts& experts_;
  int64_t n_, window_, num_chosen_ = 0;
  int32_t* starts_;  // [E + 1]: of each expert's rows
  int32_t* chosen_;  // [num_chosen]: experts that have rows
  int32_t* rows_;    // by expert
  float* weights_;
};

// Floats of shared space of mix_experts: fixed, and for each row of a window.
struct SharedNeed {
  int64_t fixed, per_row;

  int64_t least() const { return fixed + per_row; }
  int64_t window(int64_t floats) const { return (floats - fixed) / per_row; }
};

// Units of several groups in one line, so that members who run out of one group's begin the next one's.
class Queue {
 public:
  // starts: memory of size + 1 numbers. units_of(group): how many it has.
  template <typename UnitsOf>
  Queue(int32_t* starts, int64_t size, const UnitsOf& units_of) : starts_(starts), size_(size) {
    starts[0] = 0;
    for (int64_t group = 0; group < size; group++) {
      starts[group + 1] = starts[group] + static_cast<int32_t>(units_of(group));
    }
  }

  int64_t num_units() const { return starts_[size_]; }
  // (group, which of its units)
  std::pair<int64_t, int64_t> operator[](int64_t unit) const {
    const int64_t group = std::upper_bound(starts_, starts_ + size_ + 1, unit) - starts_ - 1;
    return {group, unit - starts_[group]};
  }

 private:
  const int32_t* starts_;
  int64_t size_;
};

// out [rows, hidden] = the shared experts, if any, plus the sum over a row's experts that take part, in
// ascending order, of weight * down(silu(gate x) * up x). Rows are grouped by expert, so a panel of weights
// is decoded once for all its rows of a window that fits the shared space. Scratch: experts_floats. Shared:
// at least experts_shared_floats.
void mix_experts(const Machine& machine, int64_t rows, Matrix x, Matrix ids, Matrix weights,
                 const Experts& experts, Matrix out);
int64_t experts_floats(const Experts& experts);
int64_t experts_shared_floats(const Experts& experts, int64_t per_token);

}  // namespace kvfold
