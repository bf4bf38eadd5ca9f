#include "kernels/ceilings.h"

#include <cstring>

#include "dispatch.h"
#include "simd/tile_shapes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KVFOLD_X86
#define KVFOLD_TARGET(sets) __attribute__((target(sets)))
#else
#define KVFOLD_TARGET(sets)
#endif
#if defined(__clang__)
#define KVFOLD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVFOLD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace kvfold {
namespace {

// --- reading ---

// Four streams a quarter of the memory apart, so that the walks to their pages overlap: as fast as one stream
// on 2 MiB pages, 1.2 to 1.3 times as fast on 4 KiB pages (Zen 4, virtual machine, 1 and 2 threads). One is
// 1.37 times as fast as four on an Emerald Rapids (2 MiB pages, 2 threads, 26 GB/s).
// Of one turn, into two sums: with four streams eight in all, which hide their latency.
constexpr int64_t kStreamBytes = 128;
constexpr int64_t kWholeBytes = 4 * kStreamBytes;

// One instance for each width of a vector, in its target, and each number of streams.
#define KVFOLD_READ(name, bytes, sets)                                                        \
  template <int kStreams>                                                                     \
  KVFOLD_TARGET(sets)                                                                         \
  uint64_t name(const uint8_t* data, int64_t size) {                                          \
    typedef uint64_t Vector __attribute__((vector_size(bytes)));                              \
    typedef uint64_t Loaded __attribute__((vector_size(bytes), aligned(1), may_alias));       \
    const int64_t length = size / kWholeBytes * kWholeBytes / kStreams;                       \
    Vector sum[kStreams][2] = {};                                                             \
    for (const uint8_t* end = data + length; data != end; data += kStreamBytes) {             \
      KVFOLD_UNROLL for (int stream = 0; stream < kStreams; stream++) {                       \
        const uint8_t* from = data + stream * length;                                         \
        KVFOLD_UNROLL for (int i = 0; i < kStreamBytes / bytes; i++) {                        \
          sum[stream][i % 2] += *reinterpret_cast<const Loaded*>(from + i * bytes);           \
        }                                                                                     \
      }                                                                                       \
    }                                                                                         \
    Vector all = {};                                                                          \
    for (int stream = 0; stream < kStreams; stream++) all += sum[stream][0] + sum[stream][1]; \
    uint64_t total = 0;                                                                       \
    for (unsigned i = 0; i < bytes / sizeof(uint64_t); i++) total += all[i];                  \
    return total;                                                                             \
  }

KVFOLD_READ(read_16, 16, "sse2")
#ifdef KVFOLD_X86
KVFOLD_READ(read_32, 32, "avx2")
KVFOLD_READ(read_64, 64, "avx512f")
#endif

// --- multiplying ---

// Twelve chains hide a latency of 4 to 5 cycles at 2 instructions a cycle, and fit 16 registers beside their
// operands.
constexpr int kChains = 12;

#ifdef KVFOLD_X86
// Assembly, because a compiler would fold or spill what it understands. The bits of the operands are neither
// zero nor special, so that multipliers draw the power they draw in use.
#define KVFOLD_PEAK(name, bytes, sets, instructions)                                               \
  KVFOLD_TARGET(sets) void name(int64_t rounds) {                                                  \
    typedef float Vector __attribute__((vector_size(bytes)));                                      \
    Vector sum[kChains] = {}, x, y, ones, product;                                                 \
    std::memset(&x, 0x3c, bytes); /* 60 as a byte, 0.0115 as bfloat16 and as float32 */            \
    std::memset(&y, 0x3b, bytes);                                                                  \
    const int16_t one = 1;                                                                         \
    for (int i = 0; i < bytes; i += 2) std::memcpy(reinterpret_cast<char*>(&ones) + i, &one, 2);   \
    for (int64_t round = 0; round < rounds; round++) {                                             \
      KVFOLD_UNROLL for (int i = 0; i < kChains; i++) {                                            \
        __asm__ volatile(instructions : "+v"(sum[i]), "=&v"(product) : "v"(x), "v"(y), "v"(ones)); \
      }                                                                                            \
    }                                                                                              \
  }

// AVX2 has no dot of bytes: one operand of vpmaddubsw is unsigned and pairs of products fit int16 only if
// that is at most 127. This is the shortest sequence for such codes, bound by the two multipliers; codes of 4
// bits add several pairs before widening them and may pass it. %0 sum, %1 a free register, %2 and %3 the
// operands, %4 ones of 16 bits
KVFOLD_PEAK(int8_avx512, 64, "avx512f,avx512vnni", "vpdpbusd %2, %3, %0")
KVFOLD_PEAK(int8_avx2, 32, "avx2", "vpmaddubsw %2, %3, %1\n vpmaddwd %4, %1, %1\n vpaddd %1, %0, %0")
KVFOLD_PEAK(bf16_avx512, 64, "avx512f,avx512bf16", "vdpbf16ps %2, %3, %0")
KVFOLD_PEAK(f32_avx512, 64, "avx512f", "vfmadd231ps %2, %3, %0")
KVFOLD_PEAK(f32_avx2, 32, "avx2,fma", "vfmadd231ps %2, %3, %0")
#endif

#ifdef KVFOLD_AMX_SET
// Tiles of 16 rows of 64 bytes: four of sums, 0 to 3, out of two of each operand, 4 to 7.
constexpr int kTileSums = 4;
void int8_tiles(int64_t rounds) {
  static constexpr TileShapes shapes;
  uint8_t operand[16 * 64];
  std::memset(operand, 0x3c, sizeof operand);
  __asm__ volatile(
      "ldtilecfg %0\n"
      "tileloadd (%1,%2,1), %%tmm4\n tileloadd (%1,%2,1), %%tmm5\n"
      "tileloadd (%1,%2,1), %%tmm6\n tileloadd (%1,%2,1), %%tmm7"
      :
      : "m"(shapes), "r"(operand), "r"(int64_t{64})
      : "memory");
  for (int64_t round = 0; round < rounds; round++) {
    __asm__ volatile(
        "tdpbssd %tmm6, %tmm4, %tmm0\n tdpbssd %tmm7, %tmm4, %tmm1\n"
        "tdpbssd %tmm6, %tmm5, %tmm2\n tdpbssd %tmm7, %tmm5, %tmm3");
  }
  __asm__ volatile("tilerelease");
}
#endif

// What any compiler makes of vectors of 16 bytes: a product and a sum in every chain.
template <typename Number>
void plain(int64_t rounds) {
  typedef Number Vector __attribute__((vector_size(16)));
  Vector sum[kChains] = {}, x = Vector{} + Number(1), y = Vector{} + Number(5);
  __asm__ volatile("" : "+m"(x), "+m"(y));  // unknown to the compiler
  for (int64_t round = 0; round < rounds; round++) {
    KVFOLD_UNROLL for (int i = 0; i < kChains; i++) sum[i] = sum[i] * x + y;
  }
  for (int i = 1; i < kChains; i++) sum[0] += sum[i];
  __asm__ volatile("" : : "m"(sum[0]));
}

}  // namespace

ReadLoop read_loop(int streams) {
#ifdef KVFOLD_X86
  if (__builtin_cpu_supports("avx512f")) return streams == 1 ? read_64<1> : read_64<4>;
  if (__builtin_cpu_supports("avx2")) return streams == 1 ? read_32<1> : read_32<4>;
#endif
  return streams == 1 ? read_16<1> : read_16<4>;
}

Peak int8_peak() {
#ifdef KVFOLD_X86
  if (__builtin_cpu_supports("avx512vnni")) return {"avx512_vnni", kChains * 64, int8_avx512};
  if (__builtin_cpu_supports("avx2")) return {"avx2", kChains * 32, int8_avx2};
#endif
  return {"baseline", kChains * 8, plain<int16_t>};
}

Peak int8_tiles_peak() {
#ifdef KVFOLD_AMX_SET
  for (const InstructionSet* set : instruction_sets()) {
    if (std::strcmp(set->name, "amx") == 0) return {"amx", kTileSums * 16 * 16 * 64, int8_tiles};
  }
#endif
  return {"", 0, nullptr};
}

Peak bf16_peak() {
#ifdef KVFOLD_X86
  if (__builtin_cpu_supports("avx512bf16")) return {"avx512_bf16", kChains * 32, bf16_avx512};
#endif
  return {"", 0, nullptr};
}

Peak f32_peak() {
#ifdef KVFOLD_X86
  if (__builtin_cpu_supports("avx512f")) return {"avx512", kChains * 16, f32_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", kChains * 8, f32_avx2};
#endif
  return {"baseline", kChains * 4, plain<float>};
}

}  // namespace kvfold
