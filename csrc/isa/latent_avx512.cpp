// Attention over latents with AVX-512, VNNI and BF16. A file of its own, so that it compiles beside
// avx512.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx512.h"

#include "simd/avx512_decode.h"

#include "kernels/latent_tile.h"

namespace kvfold {
static_assert(FastFold<Avx512, blocks::IQ4_NL>::rows != nullptr);  // simd/avx512_decode.h is there
extern const LatentKernels avx512_latent = LatentTile<Avx512>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
