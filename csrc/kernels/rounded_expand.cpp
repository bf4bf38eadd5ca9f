#include "kernels/rounded_expand.h"

namespace kvfold {
namespace {

// Latents lie in groups of the kernels' columns; the largest group of any instruction set is this many.
constexpr int64_t kMostGroup = 16;

}  // namespace

int64_t rounded_latent_floats(const MlaDims& dims, int64_t keys) {
  const int64_t by_rows = (keys + kMostGroup) * (dims.kv_lora + 3);
  return whole_lines(by_rows) +
         whole_lines((keys + kMostWords.group_rows) * kMostWords.words_of(dims.kv_lora));
}

uint8_t* RoundedLatents::rows(int64_t key) const {
  auto* data = reinterpret_cast<uint8_t*>(memory);
  const MatrixKernels* kernels = row_kernels(dims, up);
  if (!kernels) return data + key * dims.kv_lora * 4;
  return data + key / kernels->tile_cols * kernels->tile_bytes(dims.kv_lora);
}

uint32_t* RoundedLatents::words(int64_t key) const {
  float* data = memory + whole_lines((keys + kMostGroup) * (dims.kv_lora + 3));
  return reinterpret_cast<uint32_t*>(data) + key * isa().pairs->words_of(dims.kv_lora);
}

void RoundedLatents::round(const float* c_kv, int64_t stride, int64_t first, int64_t n) const {
  if (const MatrixKernels* kernels = row_kernels(dims, up)) {
    kernels->prepare_tile(c_kv, stride, nullptr, n, dims.kv_lora, rows(first));
  } else {
    for (int64_t i = 0; i < n; i++)
      std::copy_n(c_kv + i * stride, dims.kv_lora, reinterpret_cast<float*>(rows(first + i)));
  }
  if (up.kv_b) return;
  const int64_t group_rows = isa().pairs->group_rows;
  for (int64_t i = 0; i < n; i += group_rows) {
    isa().pairs->pack_rows(c_kv + i * stride, stride, std::min(group_rows, n - i), dims.kv_lora,
                           words(first + i));
  }
}

// 32 rows of float32, which no panel of 32 rows exceeds: an int8 panel has 10 bytes and less for 8 weights'
// 32, and panels of numbers are rounded up to 4 columns.
int64_t HeadRows::panel_floats() const { return kPanelLanes * (weight.cols + 3); }

void HeadRows::unpack(int64_t at, int64_t n, float* panel) const {
  if (!kernels) {
    for (int64_t i = 0; i < n; i += panel_rows(weight)) {
      const int64_t rows = std::min(panel_rows(weight), n - i);
      float* to = panel + i * weight.cols;
      const float* from = decode_panel(weight, first + at + i, rows, to);
      if (from != to) std::copy_n(from, rows * weight.cols, to);
    }
    return;
  }
  const int64_t row = first + at, row_bytes = weight.type->row_bytes(weight.cols);
  const uint8_t* raw = weight.parts[row / weight.part_rows].raw + row % weight.part_rows * row_bytes;
  for (int64_t i = 0; i < n; i += kernels->tile_rows) {
    kernels->unpack(
        raw + i * row_bytes, row_bytes, std::min<int64_t>(kernels->tile_rows, n - i), weight.cols,
        reinterpret_cast<uint8_t*>(panel) + i / kernels->tile_rows * kernels->panel_bytes(weight.cols));
  }
}

void HeadRows::multiply(const float* panel, int64_t n, const uint8_t* x, int64_t keys, float* y) const {
  if (!kernels) {
    tiles().nt(reinterpret_cast<const float*>(x), weight.cols, nullptr, keys, panel, weight.cols, n,
               weight.cols, y, kPanelLanes);
    return;
  }
  for (int64_t i = 0; i < n; i += kernels->tile_rows) {
    kernels->tile(
        reinterpret_cast<const uint8_t*>(panel) + i / kernels->tile_rows * kernels->panel_bytes(weight.cols),
        std::min<int64_t>(kernels->tile_rows, n - i), weight.cols, x, kernels->tile_bytes(weight.cols), keys,
        nullptr, 0, y + i, kPanelLanes, nullptr, 0);
  }
}

void unpack_columns(const KvUp& up, const MlaDims& dims, int64_t head, float* decoded, uint32_t* panels) {
  const Weight& uk = up.uk();
  const PairKernels& kernels = *isa().pairs;
  const int64_t words = kernels.words_of(dims.kv_lora);
  for_panels(uk, up.uk_row(dims, head), dims.kv_lora, decoded, [&](const float* rows, int64_t at, int64_t n) {
    for (int64_t column = 0; column < dims.nope; column += kPanelLanes) {
      kernels.pack_values(rows + column, uk.cols, n, std::min(kPanelLanes, dims.nope - column),
                          panels + column * words + at / kernels.word_numbers * kPanelLanes);
    }
  });
  for (int64_t column = 0; column < dims.nope; column += kPanelLanes) {
    kernels.fill_values(panels + column * words, dims.kv_lora);
  }
}

int64_t expand_rounded_floats(const MlaDims& dims, const KvUp& up) {
  const int64_t by_rows = whole_lines(kPanelLanes * (dims.kv_lora + 3)) + kLatentKeys * kPanelLanes;
  if (up.kv_b) return by_rows;
  const int64_t width = panels_of(dims.nope) * kPanelLanes;
  const int64_t by_columns =
      width * kMostWords.words_of(dims.kv_lora) + std::max(panel_floats(up.uk()), kLatentKeys * width);
  return std::max(by_rows, by_columns);
}

}  // namespace kvfold
