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

#include "kernels/quant_types.h"  // before the target region: its functions are shared with other files

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")
#include "simd/avx512.h"

#include "kernels/quant_set.h"

namespace kvfold {
extern const PairKernels avx512_pairs;     // pairs_avx512.cpp
extern const LatentKernels avx512_latent;  // latent_avx512.cpp
const InstructionSet& avx512_set() { return make_set<Avx512>(avx512_pairs, avx512_latent); }
}  // namespace kvfold
#pragma GCC pop_options
#endif
