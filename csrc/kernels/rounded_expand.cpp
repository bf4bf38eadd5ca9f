#include "kernels/rounded_expand.h"

#include <algorithm>

namespace kvfold {
namespace {

// Latents lie in groups of the kernels' columns; the largest group of any instruction set is this many.
constexpr int64_t kMostGroup = 16;

}  // namespace

int64_t rounded_latent_floats(const MlaDims& dims, int64_t keys) {
  const int64_t by_rows = (keys + kMostGroup) * (dims.kv_lora + 3);
  return whole_lines(by_rows) +
         whole_lines((keys + kMostWords.group_rows) * kMostWords.row_words(dims.kv_lora));
}

uint8_t* RoundedLatents::rows(int64_t key) const {
  auto* data = reinterpret_cast<uint8_t*>(memory);
  const MatrixKernels* kernels = row_kernels(dims, up);
  if (!kernels) return data + key * dims.kv_lora * 4;
  return data + key / kernels->tile_cols * kernels->tile_bytes(dims.kv_lora);
}

uint32_t* RoundedLatents::words(int64_t key) const {
  float* data = memory + whole_lines((keys + kMostGroup) * (dims.kv_lora + 3));
  return reinterpret_cast<uint32_t*>(data) + key * isa().pairs->row_words(dims.kv_lora);
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

void HeadRows::multiply(const float* panel, int64_t n, const uint8_t* x, int64_t keys, float* y,
                        int64_t stride) const {
  if (!kernels) {
    tiles().nt(reinterpret_cast<const float*>(x), weight.cols, nullptr, keys, panel, weight.cols, n,
               weight.cols, y, stride);
    return;
  }
  for (int64_t i = 0; i < n; i += kernels->tile_rows) {
    kernels->tile(
        reinterpret_cast<const uint8_t*>(panel) + i / kernels->tile_rows * kernels->panel_bytes(weight.cols),
        std::min<int64_t>(kernels->tile_rows, n - i), weight.cols, x, kernels->tile_bytes(weight.cols), keys,
        nullptr, 0, y + i, stride, nullptr, 0);
  }
}

namespace {

// y [n][stride] = latents [first, first + n) times `rows` of a head.
void multiply_rows(const RoundedLatents& latents, const HeadRows& rows, int64_t first, int64_t n,
                   float* panel, float* y, int64_t stride) {
  for (int64_t at = 0; at < rows.count; at += kPanelLanes) {
    const int64_t columns = std::min(kPanelLanes, rows.count - at);
    rows.unpack(at, columns, panel);
    for (int64_t key = 0; key < n; key += kLatentKeys) {
      rows.multiply(panel, columns, latents.rows(first + key), std::min(kLatentKeys, n - key),
                    y + key * stride + at, stride);
    }
  }
}

// What keys by columns take: W_UK of the head [kv_lora, nope], a panel of its columns, and their products
// with a group of latents.
struct ColumnMemory {
  float* decoded;
  uint32_t* panel;
  float* products;

  static int64_t panel_words(const MlaDims& dims) { return kMostWords.row_words(dims.kv_lora) * kPanelLanes; }
  static int64_t floats(const MlaDims& dims) {
    return whole_lines(dims.kv_lora * dims.nope) + panel_words(dims) + kMostWords.group_rows * kPanelLanes;
  }
  ColumnMemory(const MlaDims& dims, float* memory)
      : decoded(memory),
        panel(reinterpret_cast<uint32_t*>(memory + whole_lines(dims.kv_lora * dims.nope))),
        products(reinterpret_cast<float*>(panel + panel_words(dims))) {}
};

// The first dims.nope columns of y [n][stride].
void multiply_columns(const RoundedLatents& latents, int64_t head, int64_t first, int64_t n,
                      const ColumnMemory& memory, float* y, int64_t stride) {
  const MlaDims& dims = latents.dims;
  const PairKernels& pairs = *isa().pairs;
  const float* w_uk =
      decode_panel(latents.up.uk(), latents.up.uk_row(dims, head), dims.kv_lora, memory.decoded);
  for (int64_t at = 0; at < dims.nope; at += kPanelLanes) {
    const int64_t columns = std::min(kPanelLanes, dims.nope - at);
    pairs.pack_columns(w_uk + at, dims.nope, dims.kv_lora, columns, memory.panel);
    for (int64_t key = 0; key < n; key += pairs.group_rows) {
      const int64_t keys = std::min(pairs.group_rows, n - key);
      pairs.scores(latents.words(first + key), keys, memory.panel, dims.kv_lora, columns, memory.products,
                   kPanelLanes);
      for (int64_t i = 0; i < keys; i++) {
        std::copy_n(memory.products + i * kPanelLanes, columns, y + (key + i) * stride + at);
      }
    }
  }
}

}  // namespace

int64_t expand_rounded_floats(const MlaDims& dims, const KvUp& up) {
  // A panel is at most 32 rows of float32: an int8 panel has 10 bytes and less for 8 weights' 32, and panels
  // of numbers are rounded up to 4 columns.
  const int64_t by_rows = kPanelLanes * (dims.kv_lora + 3),
                by_columns = up.kv_b ? 0 : ColumnMemory::floats(dims);
  return whole_lines(kUnitKeys * std::max(dims.qk(), dims.v)) + std::max(by_rows, by_columns);
}

const float* expand_values(const RoundedLatents& latents, int64_t head, int64_t first, int64_t n,
                           float* scratch) {
  const MlaDims& dims = latents.dims;
  const KvUp& up = latents.up;
  multiply_rows(latents, {up.uv(), row_kernels(dims, up), up.uv_row(dims, head), dims.v}, first, n,
                scratch + whole_lines(kUnitKeys * dims.v), scratch, dims.v);
  return scratch;
}

float* expand_keys(const RoundedLatents& latents, int64_t head, int64_t first, int64_t n, float* scratch) {
  const MlaDims& dims = latents.dims;
  const KvUp& up = latents.up;
  float* rest = scratch + whole_lines(kUnitKeys * dims.qk());
  if (up.kv_b) {
    multiply_rows(latents, {up.uk(), row_kernels(dims, up), up.uk_row(dims, head), dims.nope}, first, n, rest,
                  scratch, dims.qk());
  } else {
    multiply_columns(latents, head, first, n, ColumnMemory(dims, rest), scratch, dims.qk());
  }
  return scratch;
}

}  // namespace kvfold
