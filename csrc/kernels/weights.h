// A weight as its file stores it, and how rows of it become float32 for the tiles that use them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels/decode.h"

namespace kvfold {

// The matrix of one tensor of a file, or one of a stack: [rows, cols] in blocks.
struct WeightPart {
  const uint8_t* raw;  // [rows, row_bytes]
  const float* scale;  // fp8: a multiplier for each square of 128; else null
};

// Equal matrices one below the other: row r is row r % part_rows of part r / part_rows. Experts of a layer
// and heads of an up-projection come as stacks, everything else as one part.
struct Weight {
  std::string name;
  const TypeLayout* type = nullptr;
  int64_t part_rows = 0;
  int64_t cols = 0;
  std::vector<WeightPart> parts;
  const MatrixKernels* kernels = nullptr;  // that round activations; null: products in float32

  int64_t rows() const { return part_rows * static_cast<int64_t>(parts.size()); }
};

// Rows decoded at a time: 128 KiB of float32, so that a panel stays in the second-level cache while all
// activation rows pass over it.
inline int64_t panel_rows(const Weight& weight) {
  constexpr int64_t kPanelFloats = 32 * 1024;
  return std::clamp<int64_t>(kPanelFloats / weight.cols / 4 * 4, 4, 64);
}

inline int64_t panel_floats(const Weight& weight) { return panel_rows(weight) * weight.cols; }

inline int64_t num_panels(const Weight& weight, int64_t rows) {
  return (rows + panel_rows(weight) - 1) / panel_rows(weight);
}

// Rows [first, first + count) as float32 [count, cols]: in `panel`, or where the file has them if that is
// float32.
const float* decode_panel(const Weight& weight, int64_t first, int64_t count, float* panel);

// The rows panel by panel: use(rows float32 [n, cols], at, n) where `at` counts from `first`.
template <typename Use>
void for_panels(const Weight& weight, int64_t first, int64_t count, float* panel, const Use& use) {
  const int64_t step = panel_rows(weight);
  for (int64_t at = 0; at < count; at += step) {
    const int64_t n = std::min(step, count - at);
    use(decode_panel(weight, first + at, n, panel), at, n);
  }
}

}  // namespace kvfold
