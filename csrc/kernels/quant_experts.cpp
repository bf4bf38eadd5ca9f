#include "kernels/quant_experts.h"

#include <algorithm>
#include <cstring>

#include "kernels/quant_panels.h"
#include "kernels/quant_product.h"

namespace kvfold {
namespace {

constexpr int64_t kTileRows = 512;  // of an expert computed before their results are used: 64 KiB an output

// Weight rows of down that a unit has by tiles, for which all networks' rows of x come from memory once
// (26 MB of 2048 tokens of V2-Lite); fewer where members would get fewer than 8 units each.
// docs/notes/cpu-kernels.md has what it is worth.
constexpr int64_t kDownRows = 128, kUnitsOfMember = 8;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

int64_t row_bytes(const Weight& weight) { return weight.type->row_bytes(weight.cols); }

const uint8_t* raw_rows(const Weight& weight, int64_t row) {
  const uint8_t* part = weight.parts[row / weight.part_rows].raw;
  return part + row % weight.part_rows * row_bytes(weight);
}

// Activations of one network, in the form asked for, or the one of its number of rows.
struct Prepared {
  const MatrixKernels& kernels;
  int64_t k;
  ProductForm form = ProductForm::kBySize;

  bool by_dots(int64_t rows) const { return kvfold::by_dots(form, rows); }
  int64_t bytes(int64_t rows) const {
    return by_dots(rows) ? rows * kernels.dot_bytes(k)
                         : pieces(rows, kernels.tile_cols) * kernels.tile_bytes(k);
  }
  // Of any number of networks with `pairs` rows in all, so many that a row more costs `per_pair`.
  int64_t per_pair() const {
    return std::max(kernels.dot_bytes(k), pieces(kernels.tile_bytes(k), kernels.tile_cols));
  }
  int64_t slack() const { return kernels.tile_bytes(k); }

  // Where row `first` of `all` begins, the first of a group of a tile.
  int64_t offset(int64_t first, int64_t all) const {
    return by_dots(all) ? first * kernels.dot_bytes(k) : first / kernels.tile_cols * kernels.tile_bytes(k);
  }

  // Some rows of a network's `all`. Row i is x + pick[i] * stride, or x + i * stride where pick is null.
  void prepare(const float* x, int64_t stride, const int32_t* pick, int64_t rows, int64_t all,
               uint8_t* to) const {
    if (!by_dots(all)) return kernels.prepare_tile(x, stride, pick, rows, k, to);
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

  // Weight rows that are multiplied at a time: `wanted` by dots, as far as a tile of results holds them.
  // By tiles one panel, 8 to 32 rows: networks differ in their rows of x by an order of magnitude, and the
  // last units should be small.
  int64_t step(int64_t rows, int64_t wanted) const {
    if (!by_dots(rows)) return kernels.tile_rows;
    return std::min(wanted, tile_floats() / kernels.tile_cols / kernels.row_group * kernels.row_group);
  }

  // y[i * step + j] of prepared rows [first, first + rows) of a network's `all`, as many as a tile holds, and
  // the weight rows j of w, at most `step`. `after` are those that follow.
  void multiply(const PanelRows& w, int64_t step, int64_t all, const uint8_t* x, int64_t first, int64_t rows,
                float* y, uint8_t* panel, const RowsAfter& after) const {
    if (!by_dots(all)) {
      const uint8_t* groups = x + first / kernels.tile_cols * kernels.tile_bytes(k);
      return multiply_panels(kernels, w, k, groups, rows, y, step, panel, y, after);
    }
    const int64_t most = rows_of_dot(form);
    for (int64_t r = 0; r < rows; r += most) {
      kernels.dot(w.raw, w.row_bytes, w.n, k, x + (first + r) * kernels.dot_bytes(k),
                  std::min(most, rows - r), y + r * step, step, r + most >= rows ? after : RowsAfter());
    }
  }
};

// What meets gate and up, and what meets down.
struct Forms {
  Prepared in, inside;

  Forms(const Gated& matrices, ProductForm form)
      : in{*matrices.gate.kernels, matrices.gate.cols, form},
        inside{*matrices.down.kernels, matrices.down.cols, form} {}

  int64_t member_floats() const {
    return std::max(2 * in.tile_floats() + in.panel_floats(), inside.tile_floats() + inside.panel_floats());
  }
  int64_t per_pair() const { return std::max(in.per_pair(), inside.per_pair()); }
  int64_t slack() const { return std::max(in.slack(), inside.slack()); }
};

// Of the routed experts and of the shared ones, which are not asked for where there are none.
struct AllForms {
  Forms routed, shared;

  AllForms(const Experts& experts, ProductForm form)
      : routed(experts.routed, form), shared(experts.shared ? *experts.shared : experts.routed, form) {}
  const Forms& of(const RowGroup& group) const { return group.is_shared ? shared : routed; }
};

bool has_kernels(const Gated& matrices, int64_t inner, int64_t hidden) {
  const auto whole_parts = [&](const Weight& weight, int64_t rows) { return weight.part_rows % rows == 0; };
  return matrices.gate.kernels != nullptr && matrices.gate.kernels == matrices.up.kernels &&
         matrices.down.kernels != nullptr && whole_parts(matrices.gate, inner) &&
         whole_parts(matrices.up, inner) && whole_parts(matrices.down, hidden);
}

SharedNeed shared_need(const Experts& experts, int64_t per_token) {
  const AllForms forms(experts, ProductForm::kBySize);
  // Where each group's prepared rows are and where its units begin; then the groups, inner activations and
  // prepared rows.
  const int64_t groups = experts.most_groups();
  SharedNeed need{
      2 * groups + groups + 1 + RowGroups::fixed_numbers(experts) + 3 * kLineFloats +
          pieces(experts.count * forms.routed.slack(), 4),
      RowGroups::per_row(per_token) + per_token * (experts.inner() + pieces(forms.routed.per_pair(), 4))};
  if (experts.shared) {
    need.fixed += pieces(forms.shared.slack(), 4);
    need.per_row += experts.shared_inner() + pieces(forms.shared.per_pair(), 4);
  }
  return need;
}

}  // namespace

bool has_expert_kernels(const Experts& experts) {
  return has_kernels(experts.routed, experts.inner(), experts.hidden()) &&
         (!experts.shared || has_kernels(*experts.shared, experts.shared_inner(), experts.hidden()));
}

int64_t block_experts_floats(const Experts& experts) {
  const AllForms forms(experts, ProductForm::kBySize);
  return std::max(forms.routed.member_floats(), forms.shared.member_floats());
}

int64_t block_experts_shared_floats(const Experts& experts, int64_t per_token) {
  return shared_need(experts, per_token).least();
}

void mix_experts_in_blocks(const Machine& machine, int64_t rows, Matrix x, Matrix ids, Matrix weights,
                           const Experts& experts, Matrix out) {
  const int64_t hidden = x.width;
  const int members = machine.team.size();
  const AllForms forms(experts, machine.form);
  const int64_t window = std::min(rows, shared_need(experts, ids.width).window(machine.shared_floats));

  auto* offsets = reinterpret_cast<int64_t*>(machine.shared);  // of each group's prepared rows
  auto* queue = reinterpret_cast<int32_t*>(offsets + experts.most_groups());
  int32_t* numbers = queue + experts.most_groups() + 1;
  auto* activations = reinterpret_cast<float*>(numbers + RowGroups::fixed_numbers(experts) +
                                               window * RowGroups::per_row(ids.width));
  const int64_t inner_floats = window * (ids.width * experts.inner() + experts.shared_inner());
  auto* prepared =
      reinterpret_cast<uint8_t*>(machine.shared + whole_lines(activations + inner_floats - machine.shared));

  const auto in_of = [&](const RowGroup& group) -> const Prepared& { return forms.of(group).in; };
  const auto inside_of = [&](const RowGroup& group) -> const Prepared& { return forms.of(group).inside; };

  for (int64_t first = 0; first < rows; first += window) {
    const int64_t n = std::min(window, rows - first);
    const RowGroups groups(experts, ids, weights, first, n, window, numbers);

    // Every group's rows for one of its products: prepare(group, first row, rows, to).
    const auto prepare_all = [&](const auto& form_of, const auto& prepare) {
      constexpr int64_t kTileGroups = 4;
      const auto piece_rows = [&](const RowGroup& group) {
        return kTileGroups * form_of(group).kernels.tile_cols;
      };
      int64_t end = 0;
      for (int64_t g = 0; g < groups.size(); g++) {
        offsets[g] = end;
        end += form_of(groups[g]).bytes(groups[g].num_rows);
      }
      const Queue line(queue, groups.size(),
                       [&](int64_t g) { return pieces(groups[g].num_rows, piece_rows(groups[g])); });
      machine.team.for_each(line.num_units(), [&](int64_t unit, int) {
        const auto [g, piece] = line[unit];
        const RowGroup group = groups[g];
        const int64_t at = piece * piece_rows(group),
                      count = std::min(piece_rows(group), group.num_rows - at);
        prepare(group, at, count, prepared + offsets[g] + form_of(group).offset(at, group.num_rows));
      });
    };

    prepare_all(in_of, [&](const RowGroup& group, int64_t at, int64_t count, uint8_t* to) {
      const float* from = x.row(group.rows ? first : first + at);
      in_of(group).prepare(from, x.stride, group.rows ? group.rows + at : nullptr, count, group.num_rows, to);
    });

    // A unit has some weights, and of a network that goes by tiles as many rows as a tile of results holds:
    // all weights meet these before the next ones.
    struct Cut {
      int64_t step, pieces, rows;
    };
    const auto cut_of = [&](const RowGroup& group) -> Cut {
      const Prepared& in = in_of(group);
      const int64_t m = group.num_rows, step = in.step(m, dot_rows(in.kernels, group.inner,
                                                                   row_bytes(group.matrices.gate), members));
      return {step, pieces(group.inner, step), in.by_dots(m) ? m : in.row_tile(step)};
    };
    const Queue gate_up(queue, groups.size(), [&](int64_t g) {
      const Cut cut = cut_of(groups[g]);
      return cut.pieces * pieces(groups[g].num_rows, cut.rows);
    });
    const auto gate_of = [&](int64_t unit) {
      const auto [g, piece] = gate_up[unit];
      const RowGroup group = groups[g];
      const Cut cut = cut_of(group);
      return raw_rows(group.matrices.gate, group.gate_row + piece % cut.pieces * cut.step);
    };
    machine.team.for_each_with_next(gate_up.num_units(), [&](int64_t unit, int member, NextUnit& next_unit) {
      const auto [g, piece] = gate_up[unit];
      const RowGroup group = groups[g];
      const Prepared& in = in_of(group);
      const Cut cut = cut_of(group);
      const int64_t step = cut.step, at = piece % cut.pieces * step, count = std::min(step, group.inner - at),
                    bytes = row_bytes(group.matrices.gate);
      const int64_t m = group.num_rows, row = piece / cut.pieces * cut.rows,
                    last_row = std::min(m, row + cut.rows);
      const uint8_t *gate = raw_rows(group.matrices.gate, group.gate_row + at),
                    *up = raw_rows(group.matrices.up, group.gate_row + at);
      const auto after_gate = [&] { return up; };
      const auto after_up = [&]() -> const uint8_t* {
        const int64_t next = next_unit.take();
        return next < 0 ? nullptr : gate_of(next);
      };
      float *gate_tile = machine.of(member), *up_tile = gate_tile + in.tile_floats();
      auto* panel = reinterpret_cast<uint8_t*>(up_tile + in.tile_floats());
      for (int64_t i = row; i < last_row; i += in.row_tile(step)) {
        const int64_t tile = std::min(in.row_tile(step), last_row - i);
        const bool is_last = i + tile == last_row;
        in.multiply({gate, bytes, count}, step, m, prepared + offsets[g], i, tile, gate_tile, panel,
                    after_gate);
        in.multiply({up, bytes, count}, step, m, prepared + offsets[g], i, tile, up_tile, panel,
                    is_last ? RowsAfter(after_up) : RowsAfter());
        for (int64_t r = 0; r < tile; r++) {
          isa().swiglu(gate_tile + r * step, up_tile + r * step,
                       activations + group.inner_at + (i + r) * group.inner + at, count);
        }
      }
    });

    prepare_all(inside_of, [&](const RowGroup& group, int64_t at, int64_t count, uint8_t* to) {
      const float* from = activations + group.inner_at + at * group.inner;
      inside_of(group).prepare(from, group.inner, nullptr, count, group.num_rows, to);
    });

    // A unit has some rows of every network's down, so that no two members add to the same sums: by dots a
    // share worth reading ahead, by tiles some panels, the last ones one by one so that all members end
    // together.
    bool by_dots = true;
    int64_t narrow = 1;
    for (int64_t g = 0; g < groups.size(); g++) {
      const RowGroup group = groups[g];
      const Prepared& inside = inside_of(group);
      if (inside.by_dots(group.num_rows)) {  // rows that lie mixed stay in one unit
        narrow = std::max<int64_t>(narrow, inside.kernels.row_group);
        continue;
      }
      by_dots &= group.is_shared;
      narrow = std::max<int64_t>(narrow, inside.kernels.tile_rows);
    }
    const int64_t wanted =
        by_dots ? dot_rows(forms.routed.inside.kernels, hidden, row_bytes(experts.routed.down), members)
                : std::min(kDownRows, hidden / (kUnitsOfMember * members));
    const int64_t wide = pieces(std::max(wanted, narrow), narrow) * narrow,
                  num_wide = by_dots ? pieces(hidden, wide) : hidden * 3 / 4 / wide,
                  num_units = num_wide + pieces(std::max<int64_t>(0, hidden - num_wide * wide), narrow);
    const auto first_of = [&](int64_t unit) {
      return std::min(unit, num_wide) * wide + std::max<int64_t>(0, unit - num_wide) * narrow;
    };
    machine.team.for_each_with_next(num_units, [&](int64_t unit, int member, NextUnit& next_unit) {
      const int64_t unit_first = first_of(unit), unit_last = std::min(hidden, first_of(unit + 1));
      float* tile = machine.of(member);
      for (int64_t i = 0; i < n; i++) {
        std::memset(out.row(first + i) + unit_first, 0, (unit_last - unit_first) * 4);
      }
      const auto down_of = [&](int64_t network, int64_t row) {
        return raw_rows(groups[network].matrices.down, groups[network].down_row + row);
      };
      for (int64_t g = 0; g < groups.size(); g++) {
        const RowGroup group = groups[g];
        const Prepared& inside = inside_of(group);
        const int64_t m = group.num_rows, bytes = row_bytes(group.matrices.down), step = inside.step(m, wide),
                      row_tile = inside.row_tile(step);
        auto* panel = reinterpret_cast<uint8_t*>(tile + inside.tile_floats());
        for (int64_t i = 0; i < m; i += row_tile) {
          const int64_t rows_of = std::min(row_tile, m - i);
          for (int64_t at = unit_first; at < unit_last; at += step) {
            const int64_t count = std::min(step, unit_last - at);
            // More rows of this network, the next one's, or the first one's of another unit.
            const auto after_down = [&]() -> const uint8_t* {
              if (at + step < unit_last) return down_of(g, at + step);
              if (i + row_tile < m) return down_of(g, unit_first);
              if (g + 1 < groups.size()) return down_of(g + 1, unit_first);
              const int64_t next = next_unit.take();
              return next < 0 ? nullptr : down_of(0, first_of(next));
            };
            inside.multiply({down_of(g, at), bytes, count}, step, m, prepared + offsets[g], i, rows_of, tile,
                            panel, after_down);
            for (int64_t r = 0; r < rows_of; r++) {
              isa().add_scaled(tile + r * step, group.weight(i + r), out.row(first + group.row(i + r)) + at,
                               count);
            }
          }
        }
      }
    });
  }
}

}  // namespace kvfold
