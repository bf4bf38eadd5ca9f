// Prompts on quantized weights: the columns of some weight rows, a panel after the other.
//
// For few rows of activations a panel stays in the first-level cache while they pass over it, and their sums
// wait in the second level between panels: unpacking is then a fifth of the work, and reads and writes the
// first level only. Many rows pass over whole weight rows where a set takes panels from the second level as
// fast: starting a group of sums from memory four times costs them more. A busy Zen 4, 1408 x 2048 in IQ4_NL,
// GMAC/s of one thread with 512 columns a panel, or all, medians of pairs in turn: 48 rows 123, 116; 192 rows
// 136, 148; 512 rows 138, 152. Elsewhere (near_panels) whole rows are unpacked once, and few rows at a time
// pass over their panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"

namespace kvfold {

constexpr int64_t kFewRows = MatrixKernels::kFewRows;

inline int64_t unpacked_bytes(const MatrixKernels& kernels, int64_t k) {
  return (kernels.panel_bytes(k) + 63) / 64 * 64;
}
inline int64_t sums_bytes(const MatrixKernels& kernels) { return kFewRows * kernels.tile_rows * 4; }

// n rows of weights in the blocks of a file.
struct PanelRows {
  const uint8_t* raw;
  int64_t row_bytes, n;
};

// y[i * ldy + j] of rows i of x, prepared for tiles, and the rows j of w, no more than a panel has. Meanwhile
// as many bytes of the rows `after` come near: they are asked for at the beginning.
// panel: unpacked_bytes(). sums: sums_bytes(), or y itself where ldy is tile_rows.
inline void multiply_panels(const MatrixKernels& kernels, const PanelRows& w, int64_t k, const uint8_t* x,
                            int64_t rows, float* y, int64_t ldy, uint8_t* panel, float* sums,
                            const RowsAfter& after) {
  const bool few = rows <= kFewRows, near = few || kernels.near_panels;
  const int64_t step = near ? kernels.panel_columns : k, window = near ? kFewRows : rows;
  const int64_t group = kernels.tile_bytes(k), ld_sums = kernels.tile_rows;
  const uint8_t* next = after();
  const int64_t next_bytes = next ? w.n * w.row_bytes : 0;
  if (!few) kernels.unpack(w.raw, w.row_bytes, w.n, k, panel);
  for (int64_t first = 0; first < rows; first += window) {
    const int64_t count = std::min(window, rows - first);
    const uint8_t* x_window = x + first / kernels.tile_cols * group;
    float *y_window = y + first * ldy, *between = sums == y ? y_window : sums;
    for (int64_t at = 0; at < k; at += step) {
      const int64_t columns = std::min(step, k - at);
      if (few)
        kernels.unpack(w.raw + kernels.row_group * w.row_bytes * at / k, w.row_bytes, w.n, columns, panel);
      // What is next comes near in equal shares.
      const int64_t done = first * k + count * at, from = next_bytes * done / (rows * k),
                    to = next_bytes * (done + count * columns) / (rows * k);
      const bool last = at + columns == k;
      kernels.tile(few ? panel : panel + kernels.panel_bytes(at), w.n, columns,
                   x_window + kernels.tile_bytes(at), group, count, at == 0 ? nullptr : between, ld_sums,
                   last ? y_window : between, last ? ldy : ld_sums, next + from, to - from);
    }
  }
}

}  // namespace kvfold
