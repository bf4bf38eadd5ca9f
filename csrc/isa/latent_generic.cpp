// Attention over latents without intrinsics.
#include "simd/generic.h"

#include "kernels/latent_tile.h"

namespace kvfold {
extern const LatentKernels generic_latent = LatentTile<Generic>::kernels();
}  // namespace kvfold
