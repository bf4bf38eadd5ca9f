// The two inner products everything is made of, on small float32 tiles in cache.
//
//   nt: C[i, j] = sum_k A[i, k] B[j, k]      dot form: both operands along k. Rows of weights, scores
//   nn: C[i, j] += sum_k A[i, k] B[k, j]     column form: sums of rows of B. Values by weights, W_UK^T q
//
// The order of every sum is fixed by k alone: nt adds 16 lanes and folds them in halves, nn adds rows in
// order. So an element's bits depend neither on the tile it fell in, nor on threads, nor on the instruction
// set (products are rounded before they are added).
//
// One core of a Zen 4, 16 x 64 x 576 tiles: 14 GMAC/s in nt and 18 in nn with the generic set, 26 and 45 with
// avx2, 40 and 45 with avx512.

#pragma once

#include <cstdint>

#include "dispatch.h"

namespace kvfold {

struct Tiles {
  // Row i of A is a + pick[i] * lda, or a + i * lda where pick is null. C is [m, n] with row stride ldc.
  void (*nt)(const float* a, int64_t lda, const int32_t* pick, int64_t m, const float* b, int64_t ldb,
             int64_t n, int64_t k, float* c, int64_t ldc);

  // Adds to C.
  void (*nn)(const float* a, int64_t lda, int64_t m, const float* b, int64_t ldb, int64_t n, int64_t k,
             float* c, int64_t ldc);
};

// Those of the instruction set in use.
inline const Tiles& tiles() { return *isa().tiles; }

}  // namespace kvfold
