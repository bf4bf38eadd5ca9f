// Attention on whole numbers with AVX2. A file of its own, so that it compiles beside avx2.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx2.h"

#include "simd/avx2.h"

#include "kernels/pair_tile.h"

namespace kvfold {
extern const PairKernels avx2_pairs = PairTile<Avx2>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
