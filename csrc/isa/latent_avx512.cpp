// Attention over latents with AVX-512, VNNI and BF16. A file of its own, so that it compiles beside
// avx512.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx512.h"

#include "simd/avx512_decode.h"

#include "kernels/latent_tile.h"

namespace kvfold {
// simd/avx512_decode.h is there. Under the sanitizers a function's address is no constant, so this goes by
// type.
static_assert(!std::is_base_of_v<NoFold, FastFold<Avx512, blocks::IQ4_NL>>);
extern const LatentKernels avx512_latent = LatentTile<Avx512>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
