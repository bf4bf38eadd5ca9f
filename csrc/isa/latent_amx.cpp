// Attention over latents with AVX-512 and AMX. A file of its own, so that it compiles beside
// amx.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
// GCC 12 finds "uninitialized" values inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/latent_kernels.h"  // before the target region, as quant_types.h
#include "kernels/quant_types.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")
#include "simd/amx.h"

#include "kernels/latent_tile_amx.h"

namespace kvfold {
extern const LatentKernels amx_latent = LatentTileAmx<Amx>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
