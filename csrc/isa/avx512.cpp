// Byte, word and double-word instructions on all vector lengths, VBMI, VNNI and BF16: Zen 4, Ice Lake with
// BF16 and what came after.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx512.h"

#include "simd/avx512_dots.h"

#include "simd/avx512_side_by_side.h"

namespace kvfold {
namespace float_avx512 {
constexpr int kWidth = 16;
#include "kernels/tile_body.h"
}  // namespace float_avx512

// simd/avx512_dots.h is there, and no type has vector code on AVX2 alone.
static_assert(Fast<Avx512, blocks::IQ4_NL>::kDot && [] {
  bool keeps_up = true;
  for_each_quantized([&](auto type, int32_t) {
    using T = typename decltype(type)::type;
    if (Fast<Avx2, T>::kDot && !Fast<Avx512, T>::kDot) keeps_up = false;
  });
  return keeps_up;
}());
extern const PairKernels avx512_pairs;     // pairs_avx512.cpp
extern const LatentKernels avx512_latent;  // latent_avx512.cpp
const InstructionSet& avx512_set() {
  return make_set<Avx512>(float_avx512::kTiles, avx512_pairs, avx512_latent, &kSideBySide<Avx512SideBySide>);
}
}  // namespace kvfold
#pragma GCC pop_options
#endif
