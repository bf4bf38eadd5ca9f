// From the blocks of a file to float32, at speed. The definition is src/kvfold/quant/decode.py, where every
// format is explained; both are equal bit for bit, infinities included, NaN where NaN (needs
// -ffp-contract=off). Nothing here allocates, checks or fails: callers pass whole blocks, whole groups of
// rows, and memory that is there.
#pragma once

#include <cstdint>

namespace kvfold {

// Consecutive blocks to n weights; n is a whole number of blocks.
using DecodeRow = void (*)(const uint8_t* src, float* dst, int64_t n);

// Row k of one group of interleaved rows to n weights.
using DecodeGroupRow = void (*)(const uint8_t* group, int64_t k, float* dst, int64_t n);

// What quant/types.py says of a type, as far as decoding needs it, and the one of the two functions it has.
struct TypeLayout {
  int32_t id;
  int32_t block_elements;
  int32_t block_bytes;
  int32_t interleaved_rows;
  int32_t row_meta_bytes;
  DecodeRow row;
  DecodeGroupRow group_row;

  int64_t row_bytes(int64_t cols) const { return row_meta_bytes + cols / block_elements * block_bytes; }
};

// The types that decode: blocks a row after another, rows interleaved in files, and rows side by side in
// memory (kernels/side_by_side.h).
struct TypeLayouts {
  const TypeLayout *first, *last;
  const TypeLayout* begin() const { return first; }
  const TypeLayout* end() const { return last; }
};
TypeLayouts standard_layouts();
TypeLayouts interleaved_layouts();
TypeLayouts side_by_side_layouts();

// nullptr where a type does not decode.
const TypeLayout* find_layout(int type_id);

// nullptr also where rows are interleaved: those have decode_rows and decode_row_at.
DecodeRow find_decoder(int type_id);

// src: [rows, row_bytes], dst: [rows, dst_stride], of which cols are written. Interleaved: whole groups of
// rows.
void decode_rows(const TypeLayout& type, const uint8_t* src, int64_t rows, int64_t cols, float* dst,
                 int64_t dst_stride);

// One row of a matrix [.., row_bytes], interleaved or not: what an embedding look-up needs.
void decode_row_at(const TypeLayout& type, const uint8_t* matrix, int64_t row, int64_t cols, float* dst);

// The side of the squares of F8_E4M3 weights that share a multiplier.
constexpr int64_t fp8_block = 128;

// F8_E4M3 with a multiplier per square. src: [rows, cols], of a matrix whose row 0 has the multipliers
// scale[0]; `first_row` is the matrix row of src. scale: [.., scale_stride]
void decode_fp8_rows(const uint8_t* src, int64_t first_row, int64_t rows, int64_t cols, const float* scale,
                     int64_t scale_stride, float* dst, int64_t dst_stride);

}  // namespace kvfold
