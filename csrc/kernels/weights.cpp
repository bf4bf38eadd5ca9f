#include "kernels/weights.h"

namespace kvfold {
namespace {

constexpr int32_t kF32 = 0;  // ggml's number

// Rows of one part.
const float* decode_part(const Weight& weight, const WeightPart& part, int64_t first, int64_t count,
                         float* out) {
  const TypeLayout& type = *weight.type;
  const int64_t row_bytes = type.row_bytes(weight.cols);
  const uint8_t* raw = part.raw + first * row_bytes;
  if (part.scale != nullptr) {
    const int64_t scale_cols = (weight.cols + fp8_block - 1) / fp8_block;
    decode_fp8_rows(raw, first, count, weight.cols, part.scale, scale_cols, out, weight.cols);
  } else if (type.id == kF32 && reinterpret_cast<uintptr_t>(raw) % alignof(float) == 0) {
    return reinterpret_cast<const float*>(raw);
  } else if (type.interleaved_rows > 1) {
    for (int64_t i = 0; i < count; i++) {
      decode_row_at(type, part.raw, first + i, weight.cols, out + i * weight.cols);
    }
  } else {
    decode_rows(type, raw, count, weight.cols, out, weight.cols);
  }
  return out;
}

}  // namespace

const float* decode_panel(const Weight& weight, int64_t first, int64_t count, float* panel) {
  const int64_t within = first % weight.part_rows;
  if (within + count <= weight.part_rows) {
    return decode_part(weight, weight.parts[first / weight.part_rows], within, count, panel);
  }
  for (int64_t done = 0; done < count;) {
    const int64_t start = (first + done) % weight.part_rows;
    const int64_t n = std::min(count - done, weight.part_rows - start);
    float* out = panel + done * weight.cols;
    const float* rows = decode_part(weight, weight.parts[(first + done) / weight.part_rows], start, n, out);
    if (rows != out) std::copy(rows, rows + n * weight.cols, out);
    done += n;
  }
  return panel;
}

}  // namespace kvfold
