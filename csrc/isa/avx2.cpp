// AVX2 with FMA and F16C: x86-64-v3.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx2.h"

#include "simd/avx2_dots.h"

#include "simd/avx2_side_by_side.h"

namespace kvfold {
namespace float_avx2 {
constexpr int kWidth = 8;
#include "kernels/tile_body.h"
}  // namespace float_avx2

static_assert(Fast<Avx2, blocks::IQ4_NL>::kDot);  // simd/avx2_dots.h is there
extern const PairKernels avx2_pairs;              // pairs_avx2.cpp
extern const LatentKernels avx2_latent;           // latent_avx2.cpp
const InstructionSet& avx2_set() {
  return make_set<Avx2>(float_avx2::kTiles, avx2_pairs, avx2_latent, &kSideBySide<Avx2SideBySide>);
}
}  // namespace kvfold
#pragma GCC pop_options
#endif
