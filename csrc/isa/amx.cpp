// AVX-512 as in avx512.cpp, and products of tiles: Sapphire Rapids and what came after.
#include "dispatch.h"

#ifdef KVFOLD_AMX_SET
#include "isa/begin_avx512.h"

#include "simd/amx.h"

#include "kernels/quant_set.h"
#include "kernels/quant_tile_amx.h"

namespace kvfold {
extern const PairKernels amx_pairs;     // pairs_amx.cpp
extern const LatentKernels amx_latent;  // latent_amx.cpp
const InstructionSet& avx512_set();
const InstructionSet& amx_set() {
  static const KernelTable table = [] {
    const InstructionSet& like = avx512_set();
    KernelTable all;
    for (int32_t i = 0; i < like.num_kernels; i++) {
      MatrixKernels kernels = like.kernels[i];
      for_each_quantized([&](auto type, int32_t id) {
        using T = typename decltype(type)::type;
        if constexpr (Parts<T>::kRun == kBlock) {
          if (id == kernels.type) take_scaled_tiles<Amx, T>(kernels);
        }
      });
      all.add(kernels);
    }
    return all;
  }();
  static const InstructionSet set = [] {
    InstructionSet like = avx512_set();
    like.name = Amx::kName;
    like.kernels = table.kernels;
    like.pairs = &amx_pairs;
    like.latent = &amx_latent;
    return like;
  }();
  return set;
}
}  // namespace kvfold
#pragma GCC pop_options
#endif
