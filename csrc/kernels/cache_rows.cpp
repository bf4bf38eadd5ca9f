#include "kernels/cache_rows.h"

#include <cstring>

#include "kernels/decode_blocks.h"

namespace kvfold {
namespace {

using blocks::as_float;
using blocks::half_to_float;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// float16: 1 sign, 5 exponent (bias 15), 10 mantissa.
uint16_t to_f16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                               // below 2^-14: denormal
    // Adding 0.5 leaves the mantissa in units of 2^-24, rounded to nearest even by the addition.
    return static_cast<uint16_t>(sign | (bits_of(as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

float from_bf16(uint16_t half) { return as_float(static_cast<uint32_t>(half) << 16); }

uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace

Keys read_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out) {
  if (cache.type == CacheType::kF32) {
    return {static_cast<const float*>(cache.data) + cache.at(layer, page * kPageTokens) + start, cache.width};
  }
  copy_page(cache, layer, page, keys, start, count, out, count);
  return {out, count};
}

void copy_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out, int64_t stride) {
  const int64_t first = cache.at(layer, page * kPageTokens) + start;
  for (int64_t key = 0; key < keys; key++) {
    float* to = out + key * stride;
    if (cache.type == CacheType::kF32) {
      std::memcpy(to, static_cast<const float*>(cache.data) + first + key * cache.width, count * 4);
      continue;
    }
    const uint16_t* from = static_cast<const uint16_t*>(cache.data) + first + key * cache.width;
    if (cache.type == CacheType::kF16) {
      for (int64_t i = 0; i < count; i++) to[i] = half_to_float(from[i]);
    } else {
      for (int64_t i = 0; i < count; i++) to[i] = from_bf16(from[i]);
    }
  }
}

void write_slot(const CacheArray& cache, int64_t layer, int64_t slot, const float* numbers, int64_t start,
                int64_t count) {
  const int64_t first = cache.at(layer, slot) + start;
  if (cache.type == CacheType::kF32) {
    std::memcpy(static_cast<float*>(cache.data) + first, numbers, count * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(cache.data) + first;
  if (cache.type == CacheType::kF16) {
    for (int64_t i = 0; i < count; i++) to[i] = to_f16(numbers[i]);
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = to_bf16(numbers[i]);
  }
}

}  // namespace kvfold
