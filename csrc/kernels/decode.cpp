// Rows of standard blocks, and finding the decoder of a type. Interleaved rows are in decode_interleaved.cpp.
#include "kernels/decode.h"

#include <algorithm>

#include "kernels/decode_blocks.h"

namespace kvfold {
namespace {

using namespace blocks;

template <class Block>
void block_row(const uint8_t* src, float* dst, int64_t n) {
  const auto* block = reinterpret_cast<const Block*>(src);
  for (int64_t done = 0; done < n; done += Block::elements, ++block) block->decode(dst + done);
}

// Plain numbers, at any address.
template <class Number>
void number_row(const uint8_t* src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Number value;
    std::memcpy(&value, src + i * sizeof(Number), sizeof value);
    dst[i] = static_cast<float>(value);
  }
}

void f32_row(const uint8_t* src, float* dst, int64_t n) { std::memcpy(dst, src, static_cast<size_t>(n) * 4); }

void f16_row(const uint8_t* src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = half_at(src + 2 * i);
}

void bf16_row(const uint8_t* src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = as_float(static_cast<uint32_t>(load16(src + 2 * i)) << 16);
}

void e4m3_row(const uint8_t* src, float* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = e4m3_values[src[i]];
}

template <class Block>
constexpr TypeLayout standard(int32_t id) {
  return {id, Block::elements, sizeof(Block), 1, 0, block_row<Block>, nullptr};
}

constexpr TypeLayout number(int32_t id, int32_t bytes, DecodeRow row) {
  return {id, 1, bytes, 1, 0, row, nullptr};
}

constexpr TypeLayout layouts[] = {
    number(-1, 1, e4m3_row),
    number(0, 4, f32_row),
    number(1, 2, f16_row),
    standard<Q4_0>(2),
    standard<Q4_1>(3),
    standard<Q5_0>(6),
    standard<Q5_1>(7),
    standard<Q8_0>(8),
    standard<Q8_1>(9),
    standard<Q2_K>(10),
    standard<Q3_K>(11),
    standard<Q4_K>(12),
    standard<Q5_K>(13),
    standard<Q6_K>(14),
    standard<Q8_K>(15),
    standard<IQ2_XXS>(16),
    standard<IQ2_XS>(17),
    standard<IQ3_XXS>(18),
    standard<IQ1_S>(19),
    standard<IQ4_NL>(20),
    standard<IQ3_S>(21),
    standard<IQ2_S>(22),
    standard<IQ4_XS>(23),
    number(24, 1, number_row<int8_t>),
    number(25, 2, number_row<int16_t>),
    number(26, 4, number_row<int32_t>),
    number(27, 8, number_row<int64_t>),
    number(28, 8, number_row<double>),
    standard<IQ1_M>(29),
    number(30, 2, bf16_row),
    standard<TQ1_0>(34),
    standard<TQ2_0>(35),
    standard<MXFP4>(39),
    standard<NVFP4>(40),
    standard<Q1_0>(41),
    standard<Q2_0>(42),
    standard<Q6_0>(133),
};

}  // namespace

TypeLayouts standard_layouts() { return {std::begin(layouts), std::end(layouts)}; }

const TypeLayout* find_layout(int type_id) {
  for (const TypeLayouts& list : {standard_layouts(), interleaved_layouts(), side_by_side_layouts()})
    for (const TypeLayout& type : list)
      if (type.id == type_id) return &type;
  return nullptr;
}

DecodeRow find_decoder(int type_id) {
  const TypeLayout* type = find_layout(type_id);
  return type == nullptr ? nullptr : type->row;
}

void decode_row_at(const TypeLayout& type, const uint8_t* matrix, int64_t row, int64_t cols, float* dst) {
  const int64_t bytes = type.row_bytes(cols);
  if (type.row != nullptr) {
    type.row(matrix + row * bytes, dst, cols);
  } else {
    const int64_t k = row % type.interleaved_rows;
    type.group_row(matrix + (row - k) * bytes, k, dst, cols);
  }
}

void decode_rows(const TypeLayout& type, const uint8_t* src, int64_t rows, int64_t cols, float* dst,
                 int64_t dst_stride) {
  for (int64_t row = 0; row < rows; ++row) decode_row_at(type, src, row, cols, dst + row * dst_stride);
}

void decode_fp8_rows(const uint8_t* src, int64_t first_row, int64_t rows, int64_t cols, const float* scale,
                     int64_t scale_stride, float* dst, int64_t dst_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* row_scale = scale + (first_row + row) / fp8_block * scale_stride;
    const uint8_t* from = src + row * cols;
    float* __restrict to = dst + row * dst_stride;
    for (int64_t start = 0; start < cols; start += fp8_block) {
      const float multiplier = row_scale[start / fp8_block];
      const int64_t stop = std::min(start + fp8_block, cols);
      for (int64_t i = start; i < stop; ++i) to[i] = e4m3_values[from[i]] * multiplier;
    }
  }
}

}  // namespace kvfold
