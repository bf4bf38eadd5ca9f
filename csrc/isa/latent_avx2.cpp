// Attention over latents with AVX2. A file of its own, so that it compiles beside avx2.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx2.h"

#include "simd/avx2_decode.h"

#include "kernels/latent_tile.h"

namespace kvfold {
// simd/avx2_decode.h is there. Under the sanitizers a function's address is no constant, so this goes by
// type.
static_assert(!std::is_base_of_v<NoFold, FastFold<Avx2, blocks::IQ4_NL>>);
extern const LatentKernels avx2_latent = LatentTile<Avx2>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
