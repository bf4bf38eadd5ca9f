#include "simd/generic.h"

#include "kernels/quant_set.h"

namespace kvfold {
extern const PairKernels generic_pairs;     // pairs_generic.cpp
extern const LatentKernels generic_latent;  // latent_generic.cpp
const InstructionSet& generic_set() { return make_set<Generic>(generic_pairs, generic_latent); }
}  // namespace kvfold
