// The absorbed path where products round: tiles of heads times pages of latents (latent_kernels.h).
// quant/attention.py is the definition.
#pragma once

#include "kernels/attention.h"

namespace kvfold {

struct AbsorbedRows;  // attention_tiles.h

void attend_latent_rounded(const Machine& machine, const AbsorbedRows& rows, bool fused, const MlaDims& dims,
                           float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out);

// Of a member's scratch.
int64_t attend_latent_rounded_floats(const MlaDims& dims);

}  // namespace kvfold
