// Routed experts: who computes a row, and the sum of what they say.

#pragma once

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
// scores: the lower id. Scratch: route_floats. Shared: at least route_shared_floats.
void route(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, const Weight* bias,
           const Routing& routing, Matrix ids, Matrix weights);
int64_t route_floats(const Weight& weight, const Routing& routing);
int64_t route_shared_floats(const Weight& weight, const Routing& routing);

// A range of experts of one layer: gate and up [E * inner, hidden], down [E * hidden, inner].
struct Experts {
  const Weight& gate;
  const Weight& up;
  const Weight& down;
  int64_t first, last;  // those that take part
  int64_t count;        // all

  int64_t inner() const { return gate.rows() / count; }
};

// Pairs (row, choice) of a window of rows, sorted by expert, rows ascending.
struct ExpertPairs {
  const int32_t* starts;  // [E + 1]: of each expert's pairs
  const int32_t* active;  // [num_active]: experts that have pairs, ascending
  int64_t num_active;
  const int32_t* rows;   // [pairs]: row within the window
  const float* weights;  // [pairs]
};
// Of rows [first, first + n), n <= window. tables: 2 * (E + 1) numbers, pairs: two for each pair of a window.
ExpertPairs group_by_expert(const Experts& experts, Matrix ids, Matrix weights, int64_t first, int64_t n,
                            int64_t window, int32_t* tables, int32_t* pairs);

// out [rows, hidden] = sum over a row's experts that take part, in ascending order, of weight *
// down(silu(gate x) * up x). Rows are grouped by expert, so a panel of weights is decoded once for all its
// rows of a window that fits the shared space. Scratch: experts_floats. Shared: at least
// experts_shared_floats.
void mix_experts(const Machine& machine, int64_t rows, Matrix x, Matrix ids, Matrix weights,
                 const Experts& experts, Matrix out);
int64_t experts_floats(const Experts& experts);
int64_t experts_shared_floats(const Experts& experts, int64_t per_token);

}  // namespace kvfold
