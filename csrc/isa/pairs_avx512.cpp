// Attention on bfloat16 with AVX-512, two forms: by products of pairs, and of one number a word as float32.
// Which is faster is the processor's: two threads of a Zen 4 multiply pairs at 234 GMAC/s and float32 at 118,
// of an Emerald Rapids at 76 and 150. A file of its own, so that it compiles beside avx512.cpp.
#include "dispatch.h"

#ifdef KVFOLD_X86_SETS
#include "isa/begin_avx512.h"

#include "simd/avx512.h"

#include "kernels/pair_tile.h"

namespace kvfold {
namespace {

struct Avx512Numbers : Avx512 {
  using Number = float;
  static constexpr int32_t kOnes = 0x3f800000;
  static Ints nearest_bf16(Floats v) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(v)), 16); }
  static void store_numbers(Number* p, Floats v) { store_codes(p, nearest_bf16(v)); }
  static void to_numbers(const float* x, Number* out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_numbers(out + i, load(x + i));
    if (i < n) store_first(out + i, _mm512_castsi512_ps(nearest_bf16(load_first(x + i, n - i))), n - i);
  }
  static Floats add_products(Floats sum, Ints w, Ints x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
  }
};

}  // namespace

extern const PairKernels avx512_pairs = PairTile<Avx512>::kernels();
extern const PairKernels avx512_numbers = PairTile<Avx512Numbers>::kernels();
}  // namespace kvfold
#pragma GCC pop_options
#endif
