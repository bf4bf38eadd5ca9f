// The attention ops: which tiles of queries meet which blocks of keys, on which member, in which memory.
//
// Work is split over rows, heads and, for few rows over many absorbed keys, runs of pages whose softmaxes are
// merged in order; how it is split over members changes no bit.

#pragma once

#include "kernels/cache_rows.h"
#include "kernels/mla_up.h"
#include "kernels/step_view.h"

namespace kvfold {

// Writes [c_kv | k_rope] of every row to its slot.
void append_latent(const Machine& machine, const Step& step, Matrix c_kv, Matrix k_rope,
                   const CacheArray& cache, int64_t layer);

// Rows of the absorbed range: q [rows, H * latent], out [rows, H * kv_lora], both counted from the range's
// first row.
void attend_latent(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                   const CacheArray& cache, int64_t layer, Matrix q, Matrix out);

// Rows of the decompressed range: q [T, H * qk] -> those rows of out [T, H * v].
void attend_expanded(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up,
                     float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out);

// mla=0: q [T, H * qk] -> out [T, H * v].
void attend_full(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                 const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer, Matrix q, Matrix out);

// What each needs of a member's scratch.
int64_t attend_latent_floats(const MlaDims& dims, bool rounds);
int64_t attend_expanded_floats(const MlaDims& dims, const KvUp& up, bool rounds);
int64_t attend_full_floats(const MlaDims& dims, bool rounds);

// The least shared space for a sequence of so many keys: heads, keys, rows and members then go a few at a
// time. The same on every instruction set.
int64_t attention_shared_floats(const MlaDims& dims, bool rounds, Path path, bool fused, int64_t keys);

// Throws WorkspaceTooSmall where a step's longest sequence does not fit the shared space.
void check_attention_fits(const Machine& machine, const Step& step, const MlaDims& dims);

}  // namespace kvfold
