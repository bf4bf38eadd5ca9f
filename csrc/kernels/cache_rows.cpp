#include "kernels/cache_rows.h"

#include <algorithm>
#include <cmath>
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

// Every step in float32; a block with a number that is not finite gets the scale NaN.
void to_q8(const float* numbers, uint8_t* block) {
  uint32_t largest_bits = 0;
  for (int64_t i = 0; i < kQ8Block; i++)
    largest_bits = std::max(largest_bits, bits_of(numbers[i]) & 0x7fffffffu);
  const float largest = as_float(largest_bits);
  const bool finite = largest_bits < 0x7f800000u;
  std::memset(block, 0, kQ8Bytes);
  if (finite && largest < 0x1p-120f) return;
  const float scale = largest / 127.0f, inverse = 1.0f / scale;
  const uint16_t half = finite ? to_f16(scale) : uint16_t{0x7e00};
  std::memcpy(block, &half, 2);
  if (!finite) return;
  for (int64_t i = 0; i < kQ8Block; i++)
    block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::round(numbers[i] * inverse)));
}

// `count` numbers of a row, from and to its bytes.
void decode_numbers(CacheType type, const uint8_t* from, int64_t count, float* to) {
  const auto half = [&](int64_t i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    return bits;
  };
  switch (type) {
    case CacheType::kF32:
      std::memcpy(to, from, count * 4);
      break;
    case CacheType::kF16:
      for (int64_t i = 0; i < count; i++) to[i] = half_to_float(half(i));
      break;
    case CacheType::kBF16:
      for (int64_t i = 0; i < count; i++) to[i] = from_bf16(half(i));
      break;
    case CacheType::kQ8_0:
      for (int64_t i = 0; i < count; i += kQ8Block, from += kQ8Bytes, to += kQ8Block) {
        const float scale = half_to_float(half(0));
        for (int64_t j = 0; j < kQ8Block; j++) to[j] = scale * static_cast<int8_t>(from[2 + j]);
      }
      break;
  }
}

}  // namespace

Keys read_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out) {
  if (cache.type == CacheType::kF32) {
    return {reinterpret_cast<const float*>(cache.row(layer, page * kPageTokens)) + start, cache.width};
  }
  copy_page(cache, layer, page, keys, start, count, out, count);
  return {out, count};
}

void copy_page(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
               int64_t count, float* out, int64_t stride) {
  const uint8_t* from = cache.row(layer, page * kPageTokens) + cache.bytes_of(start);
  for (int64_t key = 0; key < keys; key++)
    decode_numbers(cache.type, from + key * cache.row_bytes(), count, out + key * stride);
}

void write_slot(const CacheArray& cache, int64_t layer, int64_t slot, const float* numbers, int64_t start,
                int64_t count) {
  uint8_t* to = cache.row(layer, slot) + cache.bytes_of(start);
  const auto write_halves = [&](auto round) {
    for (int64_t i = 0; i < count; i++) {
      const uint16_t bits = round(numbers[i]);
      std::memcpy(to + 2 * i, &bits, 2);
    }
  };
  switch (cache.type) {
    case CacheType::kF32:
      std::memcpy(to, numbers, count * 4);
      break;
    case CacheType::kF16:
      write_halves(to_f16);
      break;
    case CacheType::kBF16:
      write_halves(to_bf16);
      break;
    case CacheType::kQ8_0:
      for (int64_t i = 0; i < count; i += kQ8Block, to += kQ8Bytes) to_q8(numbers + i, to);
      break;
  }
}

}  // namespace kvfold
