// AVX2 with FMA and F16C: x86-64-v3.
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
#include <iterator>
#include <type_traits>

// Before the target region: what they define is shared with other files.
#include "kernels/quant_types.h"
#include "kernels/side_by_side.h"
#include "kernels/tile.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "simd/avx2.h"

#include "kernels/quant_set.h"
#include "simd/avx2_side_by_side.h"

namespace kvfold {
namespace float_avx2 {
constexpr int kWidth = 8;
#include "kernels/tile_body.h"
}  // namespace float_avx2

extern const PairKernels avx2_pairs;     // pairs_avx2.cpp
extern const LatentKernels avx2_latent;  // latent_avx2.cpp
const InstructionSet& avx2_set() {
  return make_set<Avx2>(float_avx2::kTiles, avx2_pairs, avx2_latent, kSideBySide, std::size(kSideBySide));
}
}  // namespace kvfold
#pragma GCC pop_options
#endif
