// Attention on bfloat16 with AVX-512 and AMX. A file of its own, so that it compiles
// beside amx.cpp.
#include "dispatch.h"

#ifdef KVFOLD_AMX_SET
#include "isa/begin_avx512.h"

#include "simd/amx.h"

#include "kernels/pair_tile_amx.h"

namespace kvfold {
extern const PairKernels amx_pairs = PairTileAmx<Amx>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
