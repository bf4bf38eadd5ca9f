// Keys and values out of latents, on the blocks of the file: latents are rounded once, for all heads.
//
//   by rows     kv_b, v_b: latents rounded as the type of the weights asks (quant/activations.py)
//   by columns  k_b, whose blocks run along the outputs: latents and weights as bfloat16
//
// A weight without kernels of its own is decoded to float32 and multiplies what was not rounded.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "kernels/mla_up.h"
#include "kernels/pair_kernels.h"
#include "kernels/tile.h"

namespace kvfold {

// Latents are rounded this many at a time: whole pages, panels, and groups of every kernel.
constexpr int64_t kLatentKeys = 3 * kPageTokens;
static_assert(kLatentKeys % kPanelLanes == 0 && kLatentKeys % kMostWords.group_rows == 0);

// Kernels for products by rows; null: in float32. They work within one part of a weight, and files' parts are
// whole heads.
inline const MatrixKernels* row_kernels(const MlaDims& dims, const KvUp& up) {
  const int64_t head_rows = up.kv_b ? dims.nope + dims.v : dims.v;
  return up.uv().part_rows % head_rows == 0 ? up.uv().kernels : nullptr;
}

// Rounded latents of up to `keys` keys in memory of rounded_latent_floats.
struct RoundedLatents {
  const MlaDims& dims;
  const KvUp& up;
  float* memory;
  int64_t keys;

  uint8_t* rows(int64_t key) const;    // as row_kernels() take them, or float32
  uint32_t* words(int64_t key) const;  // of bfloat16, where keys are made by columns

  // Keys [first, first + n), n <= kLatentKeys, `first` a multiple of kLatentKeys. Row i is c_kv + i * stride.
  void round(const float* c_kv, int64_t stride, int64_t first, int64_t n) const;
};
int64_t rounded_latent_floats(const MlaDims& dims, int64_t keys);

// One product of expansion: rows [first, first + count) of W_UK or W_UV for a head, kPanelLanes outputs at a
// time.
struct HeadRows {
  const Weight& weight;
  const MatrixKernels* kernels;
  int64_t first, count;

  int64_t panel_floats() const;  // of kPanelLanes rows
  // Rows [first + at, first + at + n) for products, n <= kPanelLanes.
  void unpack(int64_t at, int64_t n, float* panel) const;
  // y[i * kPanelLanes + j]: `keys` latents from x on times the n rows of the panel.
  void multiply(const float* panel, int64_t n, const uint8_t* x, int64_t keys, float* y) const;
};

// W_UK of a head by columns, as panels of values.
void unpack_columns(const KvUp& up, const MlaDims& dims, int64_t head, float* decoded, uint32_t* panels);

// What expand_rounded needs of a member's scratch.
int64_t expand_rounded_floats(const MlaDims& dims, const KvUp& up);

// Keys and values of one head from latents [first, first + n), `first` a multiple of kLatentKeys, in pieces:
//   use_k(key, keys, at, columns, y, stride), use_v(...)
// hands over y[i * stride + j], number at + j of key `key` + i; `at` is a multiple of kPanelLanes, `columns`
// up to kPanelLanes, `key` - first a multiple of kLatentKeys.
template <class UseK, class UseV>
void expand_rounded(const RoundedLatents& latents, int64_t head, int64_t first, int64_t n, float* scratch,
                    const UseK& use_k, const UseV& use_v) {
  const MlaDims& dims = latents.dims;
  const KvUp& up = latents.up;
  const auto by_rows = [&](const HeadRows& rows, const auto& use) {
    float* y = scratch + whole_lines(rows.panel_floats());
    for (int64_t at = 0; at < rows.count; at += kPanelLanes) {
      const int64_t columns = std::min(kPanelLanes, rows.count - at);
      rows.unpack(at, columns, scratch);
      for (int64_t key = first; key < first + n; key += kLatentKeys) {
        const int64_t keys = std::min(kLatentKeys, first + n - key);
        rows.multiply(scratch, columns, latents.rows(key), keys, y);
        use(key, keys, at, columns, y, kPanelLanes);
      }
    }
  };
  by_rows({up.uv(), row_kernels(dims, up), up.uv_row(dims, head), dims.v}, use_v);
  if (up.kv_b) return by_rows({up.uk(), row_kernels(dims, up), up.uk_row(dims, head), dims.nope}, use_k);

  const int64_t panels = panels_of(dims.nope), words = isa().pairs->words_of(dims.kv_lora),
                stride = panels * kPanelLanes, group_rows = isa().pairs->group_rows;
  auto* weights = reinterpret_cast<uint32_t*>(scratch);
  float* rest = scratch + panels * words * kPanelLanes;
  unpack_columns(up, dims, head, rest, weights);
  for (int64_t key = first; key < first + n; key += kLatentKeys) {
    const int64_t keys = std::min(kLatentKeys, first + n - key);
    for (int64_t i = 0; i < keys; i += group_rows) {
      isa().pairs->scores(latents.words(key + i), std::min(group_rows, keys - i),
                          {weights, words, nullptr, 0}, dims.nope, rest + i * stride, stride);
    }
    for (int64_t at = 0; at < dims.nope; at += kPanelLanes) {
      use_k(key, keys, at, std::min(kPanelLanes, dims.nope - at), rest + at, stride);
    }
  }
}

}  // namespace kvfold
