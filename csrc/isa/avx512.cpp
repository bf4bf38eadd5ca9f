// Byte, word and double-word instructions on all vector lengths, VBMI, VNNI and BF16: Zen 4, Ice Lake with
// BF16 and what came after.
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
#include <type_traits>

// Before the target region: what they define is shared with other files.
#include "kernels/quant_types.h"
#include "kernels/tile.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")
#include "simd/avx512.h"

#include "kernels/quant_set.h"

namespace kvfold {
namespace float_avx512 {
constexpr int kWidth = 16;
#include "kernels/tile_body.h"
}  // namespace float_avx512

extern const PairKernels avx512_pairs;     // pairs_avx512.cpp
extern const LatentKernels avx512_latent;  // latent_avx512.cpp
const InstructionSet& avx512_set() {
  return make_set<Avx512>(float_avx512::kTiles, avx512_pairs, avx512_latent);
}
}  // namespace kvfold
#pragma GCC pop_options
#endif
