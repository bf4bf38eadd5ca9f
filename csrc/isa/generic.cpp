#include "simd/generic.h"

#include "kernels/quant_set.h"
#include "kernels/tile.h"

namespace kvfold {
namespace float_generic {
constexpr int kWidth = 4;
#include "kernels/tile_body.h"
}  // namespace float_generic

extern const PairKernels generic_pairs;     // pairs_generic.cpp
extern const LatentKernels generic_latent;  // latent_generic.cpp
const InstructionSet& generic_set() {
  return make_set<Generic>(float_generic::kTiles, generic_pairs, generic_latent);
}
}  // namespace kvfold
