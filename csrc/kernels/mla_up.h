// The up-projections W_UK and W_UV in both layouts of files (mla/absorb.py), each exact on the blocks the
// file has.
//
//   kv_b       rows [k_nope | v] of a head, along kv_lora:  keys by rows, folding by columns
//   k_b, v_b   k_b has kv_lora rows of a head, along nope:  keys by columns, folding by rows

#pragma once

#include "kernels/cache_rows.h"
#include "kernels/step_view.h"
#include "kernels/weights.h"

namespace kvfold {

struct MlaDims {
  int64_t heads, nope, rope, v, kv_lora;

  int64_t qk() const { return nope + rope; }
  int64_t latent() const { return kv_lora + rope; }
};

struct KvUp {
  const Weight* kv_b;  // or null, and then
  const Weight* k_b;
  const Weight* v_b;

  const Weight& uk() const { return kv_b ? *kv_b : *k_b; }
  const Weight& uv() const { return kv_b ? *kv_b : *v_b; }
  // First row of a head in uk() and uv().
  int64_t uk_row(const MlaDims& dims, int64_t head) const {
    return head * (kv_b ? dims.nope + dims.v : dims.kv_lora);
  }
  int64_t uv_row(const MlaDims& dims, int64_t head) const {
    return kv_b ? head * (dims.nope + dims.v) + dims.nope : head * dims.v;
  }
};

// Rows of the absorbed range: q [T, H * qk] -> out [rows of the range, H * latent], per head [W_UK^T q_nope |
// q_rope]. Scratch: fold_floats.
void fold_q(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix q,
            Matrix out);

// o [rows of the absorbed range, H * kv_lora] -> those rows of out [T, H * v], per head W_UV o. Scratch:
// fold_floats.
void unfold_v(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix o,
              Matrix out);

// Keys and values of one head from n latents. k: [n, qk], v: [n, v], each with its own stride. panel: of uk()
// and uv().
struct Latents {
  const float* c_kv;
  int64_t c_stride;
  const float* k_rope;
  int64_t rope_stride;
};
void expand(const MlaDims& dims, const KvUp& up, int64_t head, const Latents& latents, int64_t n,
            float* panel, float* k, int64_t k_stride, float* v, int64_t v_stride);

// mla=0: expands the step's latents and writes K and V to their slots. Scratch: append_full_floats.
void append_full(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix c_kv,
                 Matrix k_rope, const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer);

int64_t fold_floats(const KvUp& up);
int64_t up_panel_floats(const KvUp& up);
int64_t append_full_floats(const MlaDims& dims, const KvUp& up, bool rounds);
int64_t append_full_shared_floats(const MlaDims& dims, bool rounds);

}  // namespace kvfold
