#include "kernels/quant_product.h"

#include <algorithm>

#include "kernels/quant_panels.h"

namespace kvfold {
namespace {

constexpr int64_t kLine = 64;
// Panels that a member takes at a time, 16 to 64 weight rows with all rows of x: 3 million multiply-adds or
// more for 48 rows of 2048 columns, 20 us at 150 a ns.
constexpr int64_t kPanelsOfUnit = 2;

int64_t whole_line_bytes(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

void product_by_dots(ThreadTeam& team, const BlockRows& w, const float* x, int64_t ldx, int64_t rows,
                     float* y, int64_t ldy, uint8_t* prepared, int64_t most) {
  const int64_t bytes = w.kernels->dot_bytes(w.k);
  for (int64_t r = 0; r < rows; r++) w.kernels->prepare_dot(x + r * ldx, w.k, prepared + r * bytes);
  const int64_t step = dot_rows(*w.kernels, w.n, w.row_bytes, team.size());
  team.for_each_with_next(pieces(w.n, step), [&](int64_t unit, int, NextUnit& next_unit) {
    const int64_t first = unit * step, n = std::min(step, w.n - first);
    const auto rows_after = [&]() -> const uint8_t* {
      const int64_t next = next_unit.take();
      return next < 0 ? nullptr : w.raw + next * step * w.row_bytes;
    };
    for (int64_t r = 0; r < rows; r += most) {
      const bool is_last = r + most >= rows;  // of those that find the weights in cache but for the first
      w.kernels->dot(w.raw + first * w.row_bytes, w.row_bytes, n, w.k, prepared + r * bytes,
                     std::min(most, rows - r), y + r * ldy + first, ldy,
                     is_last ? RowsAfter(rows_after) : RowsAfter());
    }
  });
}

void product_by_tiles(ThreadTeam& team, const BlockRows& w, const float* x, int64_t ldx, int64_t rows,
                      float* y, int64_t ldy, const ProductMemory& memory) {
  const int64_t cols = w.kernels->tile_cols, bytes = w.kernels->tile_bytes(w.k);
  constexpr int64_t kGroups = 4;
  team.for_each(pieces(rows, kGroups * cols), [&](int64_t unit, int) {
    const int64_t group = unit * kGroups, first = group * cols;
    w.kernels->prepare_tile(x + first * ldx, ldx, nullptr, std::min(kGroups * cols, rows - first), w.k,
                            memory.shared + group * bytes);
  });
  const int64_t size = w.kernels->tile_rows, panels = pieces(w.n, size);
  team.for_each_with_next(pieces(panels, kPanelsOfUnit), [&](int64_t unit, int member, NextUnit& next_unit) {
    uint8_t* panel_memory = memory.of(member);
    auto* sums = reinterpret_cast<float*>(panel_memory + unpacked_bytes(*w.kernels, w.k));
    const int64_t end = std::min(panels, (unit + 1) * kPanelsOfUnit);
    for (int64_t panel = unit * kPanelsOfUnit; panel < end; panel++) {
      const auto panel_after = [&]() -> const uint8_t* {
        if (panel + 1 < end) return w.raw + (panel + 1) * size * w.row_bytes;
        const int64_t next = next_unit.take();
        return next < 0 ? nullptr : w.raw + next * kPanelsOfUnit * size * w.row_bytes;
      };
      const int64_t first = panel * size, n = std::min(size, w.n - first);
      multiply_panels(*w.kernels, {w.raw + first * w.row_bytes, w.row_bytes, n}, w.k, memory.shared, rows,
                      y + first, ldy, panel_memory, sums, panel_after);
    }
  });
}

}  // namespace

int64_t product_shared_bytes(const MatrixKernels& kernels, int64_t rows, int64_t k, ProductForm form) {
  return whole_line_bytes(by_dots(form, rows) ? rows * kernels.dot_bytes(k)
                                              : pieces(rows, kernels.tile_cols) * kernels.tile_bytes(k));
}

int64_t product_own_bytes(const MatrixKernels& kernels, int64_t k) {
  return unpacked_bytes(kernels, k) + sums_bytes(kernels);
}

void product(ThreadTeam& team, const BlockRows& weight, const float* x, int64_t ldx, int64_t rows, float* y,
             int64_t ldy, const ProductMemory& memory, ProductForm form) {
  if (rows == 0 || weight.n == 0) return;
  if (by_dots(form, rows)) {
    product_by_dots(team, weight, x, ldx, rows, y, ldy, memory.shared, rows_of_dot(form));
  } else {
    product_by_tiles(team, weight, x, ldx, rows, y, ldy, memory);
  }
}

}  // namespace kvfold
