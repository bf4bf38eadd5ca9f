// moe.h's mix_experts on the blocks of a file, with activations rounded as its kernels ask.
#pragma once

#include "kernels/moe.h"

namespace kvfold {

// Whether all matrices have kernels, gate and up the same.
bool has_expert_kernels(const Experts& experts);

// As mix_experts, for experts that have kernels.
void mix_experts_in_blocks(const Machine& machine, int64_t rows, Matrix x, Matrix ids, Matrix weights,
                           const Experts& experts, Matrix out);
int64_t block_experts_floats(const Experts& experts);
int64_t block_experts_shared_floats(const Experts& experts, int64_t per_token);

}  // namespace kvfold
