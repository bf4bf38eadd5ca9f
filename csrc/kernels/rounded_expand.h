// Keys and values out of latents, on the blocks of the file: latents are rounded once, for all heads.
//
//   by rows     kv_b, v_b: latents rounded as the type of the weights asks (quant/activations.py)
//   by columns  k_b, whose blocks run along the outputs: latents and weights in the numbers of the scores
//
// A weight without kernels of its own is decoded to float32 and multiplies what was not rounded.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "kernels/mla_up.h"
#include "kernels/pair_kernels.h"
#include "kernels/tile.h"

namespace kvfold {

// Latents are rounded this many at a time: whole pages, panels, and groups of every kernel.
constexpr int64_t kLatentKeys = 3 * kPageTokens;
static_assert(kLatentKeys % kPanelLanes == 0 && kLatentKeys % kWholeGroups == 0);

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
  uint32_t* words(int64_t key) const;  // as scores take them, where keys are made by columns

  // Keys [first, first + n), n <= kLatentKeys, `first` a multiple of kLatentKeys. Row i is c_kv + i * stride.
  void round(const float* c_kv, int64_t stride, int64_t first, int64_t n) const;
};
int64_t rounded_latent_floats(const MlaDims& dims, int64_t keys);

// A unit of expansion decodes 256 * 512 weights for this many keys.
constexpr int64_t kUnitKeys = 2 * kLatentKeys;

// One product of expansion: rows [first, first + count) of W_UK or W_UV for a head, kPanelLanes outputs at a
// time.
struct HeadRows {
  const Weight& weight;
  const MatrixKernels* kernels;
  int64_t first, count;

  // Rows [first + at, first + at + n) for products, n <= kPanelLanes.
  void unpack(int64_t at, int64_t n, float* panel) const;
  // y[i * stride + j]: `keys` latents from x on times the n rows of the panel.
  void multiply(const float* panel, int64_t n, const uint8_t* x, int64_t keys, float* y,
                int64_t stride) const;
};

// What either of these two needs of a member's scratch.
int64_t expand_rounded_floats(const MlaDims& dims, const KvUp& up);

// Values [n, dims.v] of a head from latents [first, first + n), n <= kUnitKeys, `first` a multiple of
// kLatentKeys. They lie in scratch; so do the keys, [n, dims.qk()], whose rope part is left to the caller.
const float* expand_values(const RoundedLatents& latents, int64_t head, int64_t first, int64_t n,
                           float* scratch);
float* expand_keys(const RoundedLatents& latents, int64_t head, int64_t first, int64_t n, float* scratch);

}  // namespace kvfold
