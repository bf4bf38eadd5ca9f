// Rows of the paged cache: numbers in float32, float16, bfloat16 or q8_0 that become float32 where they are
// used. src/kvfold/cache/latent.py, `encode` and `decode`, is the definition.

#pragma once

#include <cstdint>

#include "kernels/step_view.h"

namespace kvfold {

enum class CacheType { kF32 = 0, kF16 = 1, kBF16 = 2, kQ8_0 = 3 };

// q8_0: 32 numbers as a float16 scale and signed codes.
constexpr int64_t kQ8Block = 32, kQ8Bytes = 34;

// cache/latent.py: PagedCache.arrays[i], rows [num_layers, num_pages, kPageTokens] of `width` numbers.
struct CacheArray {
  void* data;
  CacheType type;
  int64_t num_layers;
  int64_t num_pages;
  int64_t width;

  // Bytes of the first `count` numbers of a row; whole blocks.
  int64_t bytes_of(int64_t count) const {
    if (type == CacheType::kQ8_0) return count / kQ8Block * kQ8Bytes;
    return count * (type == CacheType::kF32 ? 4 : 2);
  }
  int64_t row_bytes() const { return bytes_of(width); }
  // A token slot; slots of a layer count through all pages.
  uint8_t* row(int64_t layer, int64_t slot) const {
    return static_cast<uint8_t*>(data) + (layer * num_pages * kPageTokens + slot) * row_bytes();
  }
};

// Keys in float32: in the cache itself where that holds float32.
struct Keys {
  const float* data;
  int64_t stride;
};

// Columns [start, start + count), whole blocks, of the first `keys` tokens of a page, in place or in `out`
// [keys, count].
Keys read_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out);

// The same, always copied, to rows of `stride` numbers.
void copy_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out, int64_t stride);

// Numbers to columns [start, start + count), whole blocks, of one slot.
void write_slot(const CacheArray& cache, int64_t layer, int64_t slot, const float* numbers, int64_t start,
                int64_t count);

}  // namespace kvfold
