// Attention on whole numbers with AVX-512. A file of its own, so that it compiles beside avx512.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx512.h"

#include "simd/avx512.h"

#include "kernels/pair_tile.h"

namespace kvfold {
extern const PairKernels avx512_pairs = PairTile<Avx512>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
