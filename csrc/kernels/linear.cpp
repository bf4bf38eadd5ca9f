#include "kernels/linear.h"

#include <algorithm>

#include "kernels/quant_product.h"
#include "kernels/tile.h"

namespace kvfold {
namespace {

// On the blocks of the file, for as many rows at a time as are near enough and the shared space holds. All
// of them go by the form of all rows: bits of the last ones should not depend on how many there are.
void linear_in_blocks(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, Matrix out) {
  const MatrixKernels& kernels = *weight.kernels;
  const bool dots = by_dots(machine.form, rows);
  const ProductForm form = dots ? machine.form : ProductForm::kTiles;
  const int64_t bytes = machine.shared_floats * 4;
  const int64_t window = dots ? bytes / kernels.dot_bytes(weight.cols)
                              : near_rows(kernels, weight.cols, rows,
                                          bytes / kernels.tile_bytes(weight.cols) * kernels.tile_cols);
  const ProductMemory memory{reinterpret_cast<uint8_t*>(machine.shared),
                             reinterpret_cast<uint8_t*>(machine.scratch), machine.member_floats * 4};
  for (int64_t first = 0; first < rows; first += window) {
    for (size_t part = 0; part < weight.parts.size(); part++) {
      product(machine.team,
              {&kernels, weight.parts[part].raw, weight.type->row_bytes(weight.cols), weight.part_rows,
               weight.cols},
              x.row(first), x.stride, std::min(window, rows - first),
              out.row(first) + static_cast<int64_t>(part) * weight.part_rows, out.stride, memory, form);
    }
  }
}

}  // namespace

int64_t linear_floats(const Weight& weight) {
  return weight.kernels ? product_own_bytes(*weight.kernels, weight.cols) / 4 : panel_floats(weight);
}

int64_t linear_shared_floats(const Weight& weight) {
  if (!weight.kernels) return 0;
  const MatrixKernels& kernels = *weight.kernels;
  const int64_t tile = kernels.tile_bytes(weight.cols), dots = kMostDotRows * kernels.dot_bytes(weight.cols);
  return whole_lines(std::max(tile, dots) / 4);
}

void linear(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, Matrix out) {
  if (rows == 0) return;
  if (weight.kernels) return linear_in_blocks(machine, rows, x, weight, out);
  const int64_t step = panel_rows(weight);
  machine.team.for_each(num_panels(weight, weight.rows()), [&](int64_t unit, int member) {
    const int64_t first = unit * step, n = std::min(step, weight.rows() - first);
    const float* panel = decode_panel(weight, first, n, machine.of(member));
    tiles().nt(x.data, x.stride, nullptr, rows, panel, weight.cols, n, weight.cols, out.data + first,
               out.stride);
  });
}

}  // namespace kvfold
