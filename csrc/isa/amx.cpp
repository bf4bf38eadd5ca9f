// AVX-512 as in avx512.cpp, and products of tiles: Sapphire Rapids and what came after.
#include "dispatch.h"

#ifdef KVFOLD_AMX_SET
#include "isa/begin_avx512.h"

#include "simd/amx_panels.h"
#include "simd/avx512_side_by_side.h"

#include "kernels/quant_tile_amx.h"

namespace kvfold {
extern const PairKernels amx_pairs;     // pairs_amx.cpp
extern const LatentKernels amx_latent;  // latent_amx.cpp
const InstructionSet& avx512_set();

// `change` is called with each of the kernels, each quantized type and its id.
template <class Types, class Change>
static KernelTable changed(const MatrixKernels* from, int32_t count, Types for_each_type, Change change) {
  KernelTable all;
  for (int32_t i = 0; i < count; i++) {
    MatrixKernels kernels = from[i];
    for_each_type([&](auto type, int32_t id) { change(kernels, type, id); });
    all.add(kernels);
  }
  return all;
}

const InstructionSet& amx_set() {
  static const KernelTable table = changed(
      avx512_set().kernels, avx512_set().num_kernels, [](auto each) { for_each_quantized(each); },
      [](MatrixKernels& kernels, auto type, int32_t id) {
        using T = typename decltype(type)::type;
        if constexpr (Parts<T>::kRun == kBlock) {
          if (id == kernels.type) take_scaled_tiles<Amx, T>(kernels);
        }
      });
  static const KernelTable side_by_side = changed(
      avx512_set().side_by_side, avx512_set().num_side_by_side,
      [](auto each) { for_each_side_by_side(each); },
      [](MatrixKernels& kernels, auto type, int32_t id) {
        using T = typename decltype(type)::type;
        if constexpr (Parts<T>::kRun == kBlock) {
          if (side_by_side_id(id) != kernels.type) return;
          take_scaled_tiles<Amx, T>(kernels);
          using Panels = typename ScaledTile<Amx, Parts<T>::kHasMin>::Panels;
          kernels.unpack = SideBySideProducts<LevelsSideBySide<T>>::template unpack<Panels>;
        }
      });
  static const InstructionSet set = [] {
    InstructionSet like = avx512_set();
    like.name = Amx::kName;
    like.kernels = table.kernels;
    like.side_by_side = side_by_side.kernels;
    like.pairs = &amx_pairs;
    like.latent = &amx_latent;
    return like;
  }();
  return set;
}
}  // namespace kvfold
#pragma GCC pop_options
#endif
