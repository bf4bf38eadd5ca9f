// Rows of the paged cache: numbers in float32, float16 or bfloat16 that become float32 where they are used.

#pragma once

#include <cstdint>

#include "kernels/step_view.h"

namespace kvfold {

enum class CacheType { kF32 = 0, kF16 = 1, kBF16 = 2 };

// cache/latent.py: PagedCache.arrays[i], [num_layers, num_pages, kPageTokens, width].
struct CacheArray {
  void* data;
  CacheType type;
  int64_t num_layers;
  int64_t num_pages;
  int64_t width;

  // First number of a token slot; slots of a layer count through all pages.
  int64_t at(int64_t layer, int64_t slot) const { return (layer * num_pages * kPageTokens + slot) * width; }
};

// Keys in float32: in the cache itself where that holds float32.
struct Keys {
  const float* data;
  int64_t stride;
};

// Columns [start, start + count) of the first `keys` tokens of a page, in place or in `out` [keys, count].
Keys read_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out);

// The same, always copied, to rows of `stride` numbers.
void copy_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out, int64_t stride);

// Numbers to columns [start, start + count) of one slot, rounded to nearest even.
void write_slot(const CacheArray& cache, int64_t layer, int64_t slot, const float* numbers, int64_t start,
                int64_t count);

}  // namespace kvfold
