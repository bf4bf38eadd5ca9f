// Ordinary attention where products round: keys and values in 16 bits, for the decompressed path (out of
// latents) and for mla=0 (out of a cache of keys and values). quant/attention.py is the definition.
//
// Keys of a sequence come in tiles that all rows of the step use before the next tile: the cost of making a
// tile is paid once a step, and a tile of 256 keys is as small as 4 MiB for 16 heads, so a larger workspace
// wins nothing.
#pragma once

#include "kernels/attention.h"

namespace kvfold {

void attend_expanded_rounded(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up,
                             float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out);
void attend_full_rounded(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                         const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer, Matrix q,
                         Matrix out);

// Of a member's scratch.
int64_t attend_expanded_rounded_floats(const MlaDims& dims, const KvUp& up);
int64_t attend_full_rounded_floats(const MlaDims& dims);

// What attention_shared_floats says of these paths.
int64_t rounded_shared_floats(const MlaDims& dims, Path path, bool fused, int64_t keys);

}  // namespace kvfold
