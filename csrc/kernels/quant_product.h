// y = x W^T on the blocks of a file, by a team of threads: which form runs, and how the work is cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "kernels/step_view.h"
#include "thread_team.h"

namespace kvfold {

// Rows of a matrix in the blocks of its file.
struct BlockRows {
  const MatrixKernels* kernels;
  const uint8_t* raw;  // [n, row_bytes]
  int64_t row_bytes, n, k;
};

// Memory of a product: `shared` by all, and `own` for each member of the team, own_bytes apart. 64-byte
// aligned.
struct ProductMemory {
  uint8_t* shared;
  uint8_t* own;
  int64_t own_bytes;

  uint8_t* of(int member) const { return own + member * own_bytes; }
};

// Up to this many rows of x are faster by row dots, which read the weights for every four of them, from cache
// but for the first. docs/notes/cpu-kernels.md has the measurement.
constexpr int64_t kMostDotRows = 8;

inline bool by_dots(ProductForm form, int64_t rows) {
  return form == ProductForm::kDots || (form == ProductForm::kBySize && rows <= kMostDotRows);
}

// Rows of x that go through a row dot together. A kernel may add in another order for two rows than for one,
// so where the form is fixed for the sake of bits each goes alone.
inline int64_t rows_of_dot(ProductForm form) {
  return form == ProductForm::kDots ? 1 : MatrixKernels::kMaxDotRows;
}

// Weight rows of a matrix of n that a member takes at a time by row dots: about 128 KiB, 4 us of reading at
// 30 GB/s, in equal shares of which every member gets as many: 113 rows of V2-Lite's in IQ4_NL, fewer where
// rows are wide (32 in F16, 16 of a router in float32), as it is the bytes that take time; 128 rows where
// they lie mixed, as two groups of these are read at once. When what was read ahead past a share's end was
// wasted, 8 KiB of it, shares of 32 rows of an expert, 36 KiB, were read at 14 GB/s where these were at 22.
inline int64_t dot_rows(const MatrixKernels& kernels, int64_t n, int64_t row_bytes, int members) {
  constexpr int64_t kUnit = 128 << 10;
  const int64_t units = (n * row_bytes + kUnit - 1) / kUnit, even = (units + members - 1) / members * members;
  const int64_t group = kernels.row_group > 1 ? 2 * kernels.row_group : 1, rows = (n + even - 1) / even;
  return std::max<int64_t>(1, (rows + group - 1) / group) * group;
}

// Of `rows` of x, prepared for tiles, those that all weights of a matrix meet before the next ones, `most` at
// most; both at least 1. Every panel of weights passes over them, so they should stay in a cache that all
// threads share, but be worth unpacking a panel for: of 8192 rows of 2048 columns, 19 MB, each panel came
// from memory. Windows are of one size, whole groups.
//
// Two threads of a Zen 3, 4096 rows of V2-Lite, GMAC/s with all of them, 960, 480 at a time: q 88 to 96, 108
// to 110, 105; down of the dense layer, whose 512 rows are 6 MB, 92 to 106, 104, 105.
inline int64_t near_rows(const MatrixKernels& kernels, int64_t k, int64_t rows, int64_t most) {
  constexpr int64_t kNearBytes = 2 << 20, kLeast = 512;
  const int64_t group = kernels.tile_cols,
                window = std::min(most, std::max(kLeast, kNearBytes / kernels.tile_bytes(k) * group)),
                groups = (rows + window - 1) / window * group;  // one of every window
  return (rows + groups - 1) / groups * group;
}

int64_t product_shared_bytes(const MatrixKernels& kernels, int64_t rows, int64_t k, ProductForm form);
int64_t product_own_bytes(const MatrixKernels& kernels, int64_t k);

// Row i of x is x + i * ldx, row i of y is y + i * ldy. Results do not depend on the size of the team.
void product(ThreadTeam& team, const BlockRows& weight, const float* x, int64_t ldx, int64_t rows, float* y,
             int64_t ldy, const ProductMemory& memory, ProductForm form);

}  // namespace kvfold
