#include "kernels/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/linear.h"
#include "kernels/quant_experts.h"
#include "kernels/rowwise.h"
#include "kernels/tile.h"

namespace kvfold {
namespace {

constexpr int64_t kRowTile = 32;  // rows of one expert computed at a time

// The k largest of n numbers to `chosen`, largest first, equal ones by index; taken[n] is working memory.
void take_largest(const float* numbers, int64_t n, int64_t k, int32_t* chosen, bool* taken) {
  std::fill(taken, taken + n, false);
  for (int64_t i = 0; i < k; i++) {
    int64_t best = -1;
    for (int64_t j = 0; j < n; j++) {
      if (!taken[j] && (best < 0 || numbers[j] > numbers[best])) best = j;
    }
    taken[best] = true;
    chosen[i] = static_cast<int32_t>(best);
  }
}

void softmax(float* scores, int64_t n) {
  const float max = *std::max_element(scores, scores + n);
  float sum = 0.0f;
  for (int64_t e = 0; e < n; e++) sum += scores[e] = std::exp(scores[e] - max);
  for (int64_t e = 0; e < n; e++) scores[e] /= sum;
}

bool has_nan(const float* numbers, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; i++) found |= numbers[i] != numbers[i];
  return found != 0;
}

float best_two(const float* scores, int64_t n) {
  float first = std::max(scores[0], scores[1]), second = std::min(scores[0], scores[1]);
  for (int64_t e = 2; e < n; e++) {
    second = std::max(second, std::min(first, scores[e]));
    first = std::max(first, scores[e]);
  }
  return first + second;
}

// Scores of experts whose group is not among the best become what the released code fills in: 0 for V2, -inf
// for V3.
void refuse_groups(float* choice, const Routing& routing, float* ranks, int32_t* kept, bool* taken) {
  const int64_t size = routing.num_experts / routing.num_groups;
  for (int64_t g = 0; g < routing.num_groups; g++) {
    const float* group = choice + g * size;
    ranks[g] = routing.top2_sum ? best_two(group, size) : *std::max_element(group, group + size);
  }
  take_largest(ranks, routing.num_groups, routing.groups_per_token, kept, taken);
  const float refused = routing.top2_sum ? -std::numeric_limits<float>::infinity() : 0.0f;
  for (int64_t g = 0; g < routing.num_groups; g++) {
    if (!taken[g]) std::fill(choice + g * size, choice + (g + 1) * size, refused);
  }
}

}  // namespace

int64_t route_floats(const Weight& weight, const Routing& routing) {
  return std::max(linear_floats(weight), 4 * routing.num_experts);
}

int64_t route_shared_floats(const Weight& weight, const Routing& routing) {
  return 2 * whole_lines(routing.num_experts) + linear_shared_floats(weight);
}

void route(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, const Weight* bias,
           const Routing& routing, Matrix ids, Matrix weights) {
  const int64_t num_experts = routing.num_experts;
  const float* correction = bias ? decode_panel(*bias, 0, 1, machine.shared) : nullptr;
  // The product has what it needs at least, or half of what is there.
  const int64_t bias_floats = whole_lines(num_experts), all = machine.shared_floats - bias_floats;
  const int64_t half = std::min(all / 2, all - bias_floats) / kLineFloats * kLineFloats;
  const int64_t of_product = std::max(linear_shared_floats(weight), half);
  const Machine inside{machine.team, machine.scratch, machine.member_floats, machine.shared + bias_floats,
                       of_product,   machine.rounds,  machine.form};
  const Matrix logits{inside.shared + of_product, num_experts, num_experts};
  const int64_t window = (all - of_product) / num_experts;
  for (int64_t first = 0; first < rows; first += window) {
    const int64_t n = std::min(window, rows - first);
    linear(inside, n, Matrix{x.row(first), x.stride, x.width}, weight, logits);
    constexpr int64_t kRows = 8;  // 512 exponentials and more
    machine.team.for_each((n + kRows - 1) / kRows, [&](int64_t unit, int member) {
      float* choice = machine.of(member);  // [E], then ranks, kept groups and marks, at most [E] each
      float* ranks = choice + num_experts;
      auto* kept = reinterpret_cast<int32_t*>(ranks + num_experts);
      auto* taken = reinterpret_cast<bool*>(kept + num_experts);
      for (int64_t i = unit * kRows; i < std::min(n, (unit + 1) * kRows); i++) {
        float* scores = logits.row(i);
        if (routing.sigmoid) {
          for (int64_t e = 0; e < num_experts; e++) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
        } else {
          softmax(scores, num_experts);
        }
        for (int64_t e = 0; e < num_experts; e++) choice[e] = scores[e] + (correction ? correction[e] : 0.0f);
        const bool is_spoiled = has_nan(choice, num_experts);
        if (routing.num_groups > 1) refuse_groups(choice, routing, ranks, kept, taken);
        int32_t* chosen = ids.ids(first + i);
        take_largest(choice, num_experts, routing.per_token, chosen, taken);
        float* out = weights.row(first + i);
        if (is_spoiled) {
          std::fill_n(out, routing.per_token, std::numeric_limits<float>::quiet_NaN());
          continue;
        }
        float sum = 1e-20f;
        for (int64_t k = 0; k < routing.per_token; k++) sum += out[k] = scores[chosen[k]];
        for (int64_t k = 0; k < routing.per_token; k++) {
          if (routing.norm_topk) out[k] /= sum;
          out[k] *= routing.scaling;
        }
      }
    });
  }
}

RowGroups::RowGroups(const Experts& experts, Matrix ids, Matrix weights, int64_t first, int64_t n,
                     int64_t window, int32_t* memory)
    : experts_(experts),
      n_(n),
      window_(window),
      starts_(memory),
      chosen_(memory + experts.count + 1),
      rows_(memory + fixed_numbers(experts)),
      weights_(reinterpret_cast<float*>(rows_ + window * ids.width)) {
  const int64_t per_token = ids.width;
  std::fill(starts_, starts_ + experts.count + 1, 0);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t k = 0; k < per_token; k++) {
      const int32_t e = ids.ids(first + i)[k];
      if (experts.takes_part(e)) starts_[e + 1]++;
    }
  }
  for (int32_t e = 0; e < experts.count; e++) {
    if (starts_[e + 1] > 0) chosen_[num_chosen_++] = e;
    starts_[e + 1] += starts_[e];
  }
  for (int64_t i = 0; i < n; i++) {
    for (int64_t k = 0; k < per_token; k++) {
      const int32_t e = ids.ids(first + i)[k];
      if (!experts.takes_part(e)) continue;
      rows_[starts_[e]] = static_cast<int32_t>(i);
      weights_[starts_[e]++] = weights.row(first + i)[k];
    }
  }
  for (int64_t e = experts.count; e > 0; e--) starts_[e] = starts_[e - 1];  // filling moved each to its end
  starts_[0] = 0;
}

RowGroup RowGroups::operator[](int64_t group) const {
  if (group < num_shared()) {
    return {*experts_.shared, true, experts_.shared_inner(), 0, 0, n_, nullptr, nullptr, 0};
  }
  const int64_t e = chosen_[group - num_shared()], start = starts_[e], inner = experts_.inner();
  return {experts_.routed,
          false,
          inner,
          e * inner,
          e * experts_.hidden(),
          starts_[e + 1] - start,
          rows_ + start,
          weights_ + start,
          window_ * experts_.shared_inner() + start * inner};
}

namespace {

// In float32.
SharedNeed shared_need(const Experts& experts, int64_t per_token) {
  return {RowGroups::fixed_numbers(experts) + experts.most_groups() + 1,
          RowGroups::per_row(per_token) + per_token * experts.inner() + experts.shared_inner()};
}

int64_t gate_up_rows(const Gated& matrices) {
  return std::min(panel_rows(matrices.gate), panel_rows(matrices.up));
}

int64_t panels_floats(const Gated& matrices) {
  return std::max(panel_floats(matrices.gate) + panel_floats(matrices.up), panel_floats(matrices.down));
}

}  // namespace

int64_t experts_floats(const Experts& experts) {
  if (has_expert_kernels(experts)) return block_experts_floats(experts);
  const int64_t panels = panels_floats(experts.routed);
  return std::max(panels, experts.shared ? panels_floats(*experts.shared) : 0) + 2 * kRowTile * 64;
}

int64_t experts_shared_floats(const Experts& experts, int64_t per_token) {
  if (has_expert_kernels(experts)) return block_experts_shared_floats(experts, per_token);
  return shared_need(experts, per_token).least();
}

void mix_experts(const Machine& machine, int64_t rows, Matrix x, Matrix ids, Matrix weights,
                 const Experts& experts, Matrix out) {
  if (has_expert_kernels(experts)) return mix_experts_in_blocks(machine, rows, x, ids, weights, experts, out);
  const int64_t hidden = x.width;
  const int64_t window = shared_need(experts, ids.width).window(machine.shared_floats);
  auto* numbers = reinterpret_cast<int32_t*>(machine.shared);
  int32_t* queue = numbers + RowGroups::fixed_numbers(experts) + window * RowGroups::per_row(ids.width);
  float* activations = machine.shared + (queue + experts.most_groups() + 1 - numbers);

  for (int64_t first = 0; first < rows; first += window) {
    const int64_t n = std::min(window, rows - first);
    const Matrix from{x.row(first), x.stride, hidden};
    const RowGroups groups(experts, ids, weights, first, n, window, numbers);

    // Calls use(i, count) for tiles of a group's rows.
    const auto for_tiles = [&](const RowGroup& group, const auto& use) {
      for (int64_t i = 0; i < group.num_rows; i += kRowTile)
        use(i, std::min<int64_t>(kRowTile, group.num_rows - i));
    };

    const Queue gate_up(queue, groups.size(), [&](int64_t g) {
      const int64_t step = gate_up_rows(groups[g].matrices);
      return (groups[g].inner + step - 1) / step;
    });
    machine.team.for_each(gate_up.num_units(), [&](int64_t unit, int member) {
      const auto [g, of_group] = gate_up[unit];
      const RowGroup group = groups[g];
      const Gated& matrices = group.matrices;
      const int64_t step = gate_up_rows(matrices), at = of_group * step,
                    count = std::min(step, group.inner - at);
      float* memory = machine.of(member);
      float *gate_tile = memory, *up_tile = gate_tile + kRowTile * count;
      float* panels = memory + 2 * kRowTile * 64;
      const float* gate = decode_panel(matrices.gate, group.gate_row + at, count, panels);
      const float* up =
          decode_panel(matrices.up, group.gate_row + at, count, panels + panel_floats(matrices.gate));
      for_tiles(group, [&](int64_t i, int64_t m) {
        const float* source = group.rows ? from.data : from.row(i);
        const int32_t* pick = group.rows ? group.rows + i : nullptr;
        tiles().nt(source, from.stride, pick, m, gate, hidden, count, hidden, gate_tile, count);
        tiles().nt(source, from.stride, pick, m, up, hidden, count, hidden, up_tile, count);
        for (int64_t r = 0; r < m; r++) {
          float* to = activations + group.inner_at + (i + r) * group.inner + at;
          for (int64_t c = 0; c < count; c++) to[c] = silu(gate_tile[r * count + c]) * up_tile[r * count + c];
        }
      });
    });

    int64_t down_step = panel_rows(experts.routed.down);
    if (experts.shared) down_step = std::min(down_step, panel_rows(experts.shared->down));
    machine.team.for_each((hidden + down_step - 1) / down_step, [&](int64_t unit, int member) {
      const int64_t at = unit * down_step, count = std::min(down_step, hidden - at);
      float* tile = machine.of(member);
      float* panel = tile + 2 * kRowTile * 64;
      for (int64_t i = 0; i < n; i++) std::memset(out.row(first + i) + at, 0, count * 4);
      for (int64_t g = 0; g < groups.size(); g++) {
        const RowGroup group = groups[g];
        const float* inner = activations + group.inner_at;
        const float* down = decode_panel(group.matrices.down, group.down_row + at, count, panel);
        for_tiles(group, [&](int64_t i, int64_t m) {
          tiles().nt(inner + i * group.inner, group.inner, nullptr, m, down, group.inner, count, group.inner,
                     tile, count);
          for (int64_t r = 0; r < m; r++) {
            float* to = out.row(first + group.row(i + r)) + at;
            for (int64_t c = 0; c < count; c++) to[c] += group.weight(i + r) * tile[r * count + c];
          }
        });
      }
    });
  }
}

}  // namespace kvfold
