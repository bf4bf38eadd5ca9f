// Attention over latents with AVX-512 and AMX. A file of its own, so that it compiles beside
// amx.cpp.
#include "dispatch.h"

#ifdef KVFOLD_AMX_SET
#include "isa/begin_avx512.h"

#include "simd/amx.h"
#include "simd/avx512_decode.h"

#include "kernels/latent_tile_amx.h"

namespace kvfold {
extern const LatentKernels amx_latent = LatentTileAmx<Amx>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
