#include "kernels/linear.h"

#include <algorithm>

#include "kernels/tile.h"

namespace kvfold {

void linear(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, Matrix out) {
  if (rows == 0) return;
  const int64_t step = panel_rows(weight);
  machine.team.for_each(num_panels(weight, weight.rows()), [&](int64_t unit, int member) {
    const int64_t first = unit * step, n = std::min(step, weight.rows() - first);
    const float* panel = decode_panel(weight, first, n, machine.of(member));
    tiles().nt(x.data, x.stride, nullptr, rows, panel, weight.cols, n, weight.cols, out.data + first,
               out.stride);
  });
}

}  // namespace kvfold
