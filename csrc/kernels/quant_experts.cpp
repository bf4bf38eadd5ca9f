#include "kernels/quant_experts.h"

#include <algorithm>
#include <cstring>

#include "kernels/quant_panels.h"
#include "kernels/quant_product.h"

namespace kvfold {
namespace {

constexpr int64_t kTileRows = 512;  // of an expert computed before their results are used: 64 KiB an output

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

const uint8_t* raw_rows(const Weight& weight, int64_t row) {
  const uint8_t* part = weight.parts[row / weight.part_rows].raw;
  return part + row % weight.part_rows * weight.type->row_bytes(weight.cols);
}

// Activations of one expert, in the form asked for, or the one of its number of rows.
struct Prepared {
  const MatrixKernels& kernels;
  int64_t k;
  ProductForm form = ProductForm::kBySize;

  bool by_dots(int64_t rows) const { return kvfold::by_dots(form, rows); }
  int64_t bytes(int64_t rows) const {
    return by_dots(rows) ? rows * kernels.dot_bytes(k)
                         : pieces(rows, kernels.tile_cols) * kernels.tile_bytes(k);
  }
  // Of any number of experts with `pairs` rows in all, so many that a row more costs `per_pair`.
  int64_t per_pair() const {
    return std::max(kernels.dot_bytes(k), pieces(kernels.tile_bytes(k), kernels.tile_cols));
  }
  int64_t slack() const { return kernels.tile_bytes(k); }

  // Row i is x + pick[i] * stride, or x + i * stride where pick is null.
  void prepare(const float* x, int64_t stride, const int32_t* pick, int64_t rows, uint8_t* to) const {
    if (!by_dots(rows)) return kernels.prepare_tile(x, stride, pick, rows, k, to);
    for (int64_t i = 0; i < rows; i++) {
      kernels.prepare_dot(x + (pick ? pick[i] : i) * stride, k, to + i * kernels.dot_bytes(k));
    }
  }

  int64_t tile_floats() const { return kTileRows * kernels.tile_rows; }
  // Rows that a tile of results holds, `step` weight rows wide.
  int64_t row_tile(int64_t step) const {
    return tile_floats() / step / kernels.tile_cols * kernels.tile_cols;
  }
  int64_t panel_floats() const { return unpacked_bytes(kernels, k) / 4; }

  // Weight rows of a matrix of n that a member takes at a time, for experts that all go by dots or do not.
  int64_t step(bool all_by_dots, int64_t n, int64_t row_bytes, int members) const {
    if (!all_by_dots) return kernels.tile_rows;
    return std::min(dot_rows(kernels, n, row_bytes, members), tile_floats() / kernels.tile_cols);
  }

  // y[i * step + j] of prepared rows [first, first + rows) of an expert's `all`, as many as a tile holds, and
  // the weight rows j < step.
  void multiply(const PanelRows& w, int64_t step, int64_t all, const uint8_t* x, int64_t first, int64_t rows,
                float* y, uint8_t* panel) const {
    if (!by_dots(all)) {
      const uint8_t* groups = x + first / kernels.tile_cols * kernels.tile_bytes(k);
      return multiply_panels(kernels, w, k, groups, rows, y, step, panel, y);
    }
    const int64_t most = rows_of_dot(form);
    for (int64_t r = 0; r < rows; r += most) {
      kernels.dot(w.raw, w.row_bytes, w.n, k, x + (first + r) * kernels.dot_bytes(k),
                  std::min(most, rows - r), y + r * step, step);
    }
  }
};

}  // namespace

bool has_expert_kernels(const Experts& experts) {
  const auto whole_parts = [&](const Weight& weight, int64_t rows) { return weight.part_rows % rows == 0; };
  return experts.gate.kernels != nullptr && experts.gate.kernels == experts.up.kernels &&
         experts.down.kernels != nullptr && whole_parts(experts.gate, experts.inner()) &&
         whole_parts(experts.up, experts.inner()) && whole_parts(experts.down, experts.gate.cols);
}

int64_t block_experts_floats(const Experts& experts) {
  const Prepared in{*experts.gate.kernels, experts.gate.cols},
      inside{*experts.down.kernels, experts.down.cols};
  return std::max(2 * in.tile_floats() + in.panel_floats(), inside.tile_floats() + inside.panel_floats());
}

namespace {

// Floats of shared space: fixed, and for each row.
struct SharedNeed {
  int64_t fixed, per_row;
};
SharedNeed shared_need(const Experts& experts, int64_t per_token) {
  const Prepared in{*experts.gate.kernels, experts.gate.cols},
      inside{*experts.down.kernels, experts.down.cols};
  const int64_t prepared = std::max(in.per_pair(), inside.per_pair()),
                slack = std::max(in.slack(), inside.slack());
  // Where each expert's rows start, those that have any and where their prepared rows are; per pair its row,
  // its weight, inner activations and prepared rows.
  return {4 * (experts.count + 1) + 3 * kLineFloats + pieces(experts.count * slack, 4),
          per_token * (2 + experts.inner() + pieces(prepared, 4))};
}

}  // namespace

int64_t block_experts_shared_floats(const Experts& experts, int64_t per_token) {
  const SharedNeed need = shared_need(experts, per_token);
  return need.fixed + need.per_row;
}

void mix_experts_in_blocks(const Machine& machine, int64_t rows, Matrix x, Matrix ids, Matrix weights,
                           const Experts& experts, Matrix out) {
  const int64_t per_token = ids.width, inner = experts.inner(), hidden = x.width;
  const Prepared in{*experts.gate.kernels, hidden, machine.form},
      inside{*experts.down.kernels, inner, machine.form};
  const SharedNeed need = shared_need(experts, per_token);
  const int64_t window = std::min(rows, (machine.shared_floats - need.fixed) / need.per_row);

  auto* starts = reinterpret_cast<int32_t*>(machine.shared);
  auto* offsets = reinterpret_cast<int64_t*>(machine.shared +
                                             whole_lines(2 * (experts.count + 1)));  // by place in active
  auto* pairs = reinterpret_cast<int32_t*>(offsets + experts.count + 1);
  auto* activations = reinterpret_cast<float*>(pairs + 2 * window * per_token);  // [pairs, inner]
  auto* prepared = reinterpret_cast<uint8_t*>(
      machine.shared + whole_lines(activations + window * per_token * inner - machine.shared));

  for (int64_t first = 0; first < rows; first += window) {
    const int64_t n = std::min(window, rows - first);
    const float* from = x.row(first);
    const ExpertPairs grouped = group_by_expert(experts, ids, weights, first, n, window, starts, pairs);
    const auto count_of = [&](int64_t a) {
      const int32_t e = grouped.active[a];
      return static_cast<int64_t>(grouped.starts[e + 1] - grouped.starts[e]);
    };
    const auto place = [&](const Prepared& form) {
      int64_t at = 0;
      for (int64_t a = 0; a < grouped.num_active; a++) {
        offsets[a] = at;
        at += form.bytes(count_of(a));
      }
    };

    place(in);
    machine.team.for_each(grouped.num_active, [&](int64_t a, int) {
      const int64_t p = grouped.starts[grouped.active[a]];
      in.prepare(from, x.stride, grouped.rows + p, count_of(a), prepared + offsets[a]);
    });

    bool all_by_dots = true;
    for (int64_t a = 0; a < grouped.num_active; a++) all_by_dots &= in.by_dots(count_of(a));
    const int64_t row_bytes = experts.gate.type->row_bytes(hidden);
    const int64_t step = in.step(all_by_dots, inner, row_bytes, machine.team.size());
    const int64_t chunks = pieces(inner, step);
    machine.team.for_each(grouped.num_active * chunks, [&](int64_t unit, int member) {
      const int64_t a = unit / chunks, e = grouped.active[a], pair = grouped.starts[e], m = count_of(a);
      const int64_t at = unit % chunks * step, count = std::min(step, inner - at);
      const uint8_t *gate = raw_rows(experts.gate, e * inner + at),
                    *up = raw_rows(experts.up, e * inner + at);
      float *gate_tile = machine.of(member), *up_tile = gate_tile + in.tile_floats();
      auto* panel = reinterpret_cast<uint8_t*>(up_tile + in.tile_floats());
      // What this member is likely to unpack next: the same rows a few units on, if they are of this expert.
      const int64_t bytes = count * row_bytes, ahead = machine.team.size() * step;
      const bool more = at + ahead + step <= inner;
      for (int64_t i = 0; i < m; i += in.row_tile(step)) {
        const int64_t tile = std::min(in.row_tile(step), m - i);
        const int64_t next_bytes = more && i + tile == m ? bytes : 0;
        in.multiply({gate, row_bytes, count, gate + ahead * row_bytes, next_bytes}, step, m,
                    prepared + offsets[a], i, tile, gate_tile, panel);
        in.multiply({up, row_bytes, count, up + ahead * row_bytes, next_bytes}, step, m,
                    prepared + offsets[a], i, tile, up_tile, panel);
        for (int64_t r = 0; r < tile; r++) {
          isa().swiglu(gate_tile + r * step, up_tile + r * step, activations + (pair + i + r) * inner + at,
                       count);
        }
      }
    });

    place(inside);
    machine.team.for_each(grouped.num_active, [&](int64_t a, int) {
      const float* rows_of = activations + grouped.starts[grouped.active[a]] * inner;
      inside.prepare(rows_of, inner, nullptr, count_of(a), prepared + offsets[a]);
    });

    const int64_t down_bytes = experts.down.type->row_bytes(inner);
    const int64_t down_step = inside.step(all_by_dots, hidden, down_bytes, machine.team.size());
    machine.team.for_each(pieces(hidden, down_step), [&](int64_t unit, int member) {
      const int64_t at = unit * down_step, count = std::min(down_step, hidden - at);
      float* tile = machine.of(member);
      auto* panel = reinterpret_cast<uint8_t*>(tile + inside.tile_floats());
      for (int64_t i = 0; i < n; i++) std::memset(out.row(first + i) + at, 0, count * 4);
      for (int64_t a = 0; a < grouped.num_active; a++) {
        const int64_t e = grouped.active[a], pair = grouped.starts[e], m = count_of(a);
        const uint8_t* down = raw_rows(experts.down, e * hidden + at);
        const bool more = a + 1 < grouped.num_active;
        const uint8_t* next = more ? raw_rows(experts.down, grouped.active[a + 1] * hidden + at) : down;
        for (int64_t i = 0; i < m; i += inside.row_tile(down_step)) {
          const int64_t rows_of = std::min(inside.row_tile(down_step), m - i);
          const int64_t next_bytes = more && i + rows_of == m ? count * down_bytes : 0;
          inside.multiply({down, down_bytes, count, next, next_bytes}, down_step, m, prepared + offsets[a], i,
                          rows_of, tile, panel);
          for (int64_t r = 0; r < rows_of; r++) {
            isa().add_scaled(tile + r * down_step, grouped.weights[pair + i + r],
                             out.row(first + grouped.rows[pair + i + r]) + at, count);
          }
        }
      }
    });
  }
}

}  // namespace kvfold
