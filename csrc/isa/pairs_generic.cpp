#include "simd/generic.h"

#include "kernels/pair_tile.h"

namespace kvfold {
extern const PairKernels generic_pairs = PairTile<Generic>::kernels();
}  // namespace kvfold
