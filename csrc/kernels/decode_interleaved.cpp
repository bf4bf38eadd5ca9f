// Rows that ik_llama.cpp stores interleaved: each mixed block gives up one row's standard block, bit for bit,
// which then decodes. Where each bit lies is explained in src/kvfold/quant/interleave.py; letters as there:
// k row of the group, i one of 4 consecutive weights, and a weight of 32 is w = 16 a + 8 h + 4 b + i.
#include "kernels/decode.h"
#include "kernels/decode_blocks.h"
#include "kernels/side_by_side.h"

namespace kvfold {
namespace {

using namespace blocks;

// qs[b][a][k][i], h in the nibbles -> 32 levels of row k.
void nibble_levels(const uint8_t (&qs)[2][2][4][4], int64_t k, uint8_t* __restrict level) {
  for (int b = 0; b < 2; ++b)
    for (int a = 0; a < 2; ++a)
      for (int i = 0; i < 4; ++i) {
        const uint8_t packed = qs[b][a][k][i];
        level[16 * a + 4 * b + i] = packed & 15;
        level[16 * a + 8 + 4 * b + i] = packed >> 4;
      }
}

// The same, packed again as the standard has 32 weights: 16 bytes, a in the nibbles.
void nibbles_to_standard(const uint8_t (&qs)[2][2][4][4], int64_t k, uint8_t* __restrict packed) {
  uint8_t level[32];
  nibble_levels(qs, k, level);
  for (int j = 0; j < 16; ++j) packed[j] = static_cast<uint8_t>(level[j] | level[16 + j] << 4);
}

// qs[run][a][k][i], the levels 4 p + i in 2-bit fields p -> the standard's [2][32], four runs of 32 in
// planes.
void pairs_to_standard(const uint8_t (&qs)[8][2][4][4], int64_t k, uint8_t (&packed)[2][32]) {
  std::memset(packed, 0, sizeof packed);
  for (int run = 0; run < 8; ++run)
    for (int a = 0; a < 2; ++a)
      for (int p = 0; p < 4; ++p)
        for (int i = 0; i < 4; ++i)
          packed[run / 4][16 * a + 4 * p + i] |=
              static_cast<uint8_t>((qs[run][a][k][i] >> 2 * p & 3) << run % 4 * 2);
}

// Field `number` of an array of fields in planes: all lowest fields first.
template <int bits, int bytes>
int plane_field(const uint8_t (&packed)[bytes], int64_t number) {
  return packed[number % bytes] >> number / bytes * bits & ((1 << bits) - 1);
}

struct IQ4_NL_R4 {
  using Standard = IQ4_NL;
  static constexpr int rows = 4;
  uint8_t d[4][2], qs[2][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    nibbles_to_standard(qs, k, out.qs);
  }
};

struct Q5_0_R4 {
  using Standard = Q5_0;
  static constexpr int rows = 4;
  uint8_t d[4][2], qh[4][4], qs[2][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    uint32_t high = 0;
    for (int w = 0; w < 32; ++w) {
      const int a = w >> 4, h = w >> 3 & 1, b = w >> 2 & 1, i = w & 3;
      high |= static_cast<uint32_t>(qh[k][i] >> (4 * h + 2 * b + a) & 1) << w;
    }
    store32(out.qh, high);
    nibbles_to_standard(qs, k, out.qs);
  }
};

struct Q6_0_R4 {
  using Standard = Q6_0;
  static constexpr int rows = 4;
  uint8_t d[4][2], qh[2][4][4], qs[2][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int b = 0; b < 2; ++b)
      for (int i = 0; i < 4; ++i) {
        int packed = 0;
        for (int h = 0; h < 2; ++h)
          for (int a = 0; a < 2; ++a) packed |= (qh[a][k][i] >> (4 * h + 2 * b) & 3) << (4 * h + 2 * a);
        out.qh[4 * b + i] = static_cast<uint8_t>(packed);
      }
    nibbles_to_standard(qs, k, out.qs);
  }
};

struct Q4_0_R8 {
  using Standard = Q4_0;
  static constexpr int rows = 8;
  uint8_t d[8][2], qs[4][8][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int l = 0; l < 4; ++l) std::memcpy(out.qs + 4 * l, qs[l][k], 4);
  }
};

struct MXFP4_R8 {
  using Standard = MXFP4;
  static constexpr int rows = 8;
  uint8_t e[8], qs[4][8][4];
  void take_row(int64_t k, Standard& out) const {
    out.e = e[k];
    for (int l = 0; l < 4; ++l) std::memcpy(out.qs + 4 * l, qs[l][k], 4);
  }
};

struct Q8_0_R8 {
  using Standard = Q8_0;
  static constexpr int rows = 8;
  uint8_t d[8][2], qs[8][8][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int l = 0; l < 8; ++l) std::memcpy(out.qs + 4 * l, qs[l][k], 4);
  }
};

struct Q2_K_R4 {
  using Standard = Q2_K;
  static constexpr int rows = 4;
  uint8_t d[4][2], dmin[4][2], scales[16][4], qs[8][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memcpy(out.dmin, dmin[k], 2);
    for (int run = 0; run < 16; ++run) out.scales[run] = scales[run][k];
    pairs_to_standard(qs, k, out.qs);
  }
};

struct Q3_K_R4 {
  using Standard = Q3_K;
  static constexpr int rows = 4;
  uint8_t d[4][2], scales_h[16], scales_l[32], qh[8][4][4], qs[8][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memset(out.scales, 0, sizeof out.scales);
    for (int run = 0; run < 16; ++run) {
      const int low = plane_field<4>(scales_l, 4 * run + k), high = plane_field<2>(scales_h, 4 * run + k);
      out.scales[run % 8] |= static_cast<uint8_t>(low << run / 8 * 4);
      out.scales[8 + run % 4] |= static_cast<uint8_t>(high << run / 4 * 2);
    }
    std::memset(out.hmask, 0, sizeof out.hmask);
    for (int run = 0; run < 8; ++run)
      for (int w = 0; w < 32; ++w)
        out.hmask[w] |= static_cast<uint8_t>((qh[run][k][w & 3] >> (w >> 2) & 1) << run);
    pairs_to_standard(qs, k, out.qs);
  }
};

// The packed scales and minimums of Q4_K and Q5_K, from scales_l[run][k] and the nibbles 4 run + k of
// scales_h.
void k_scales_to_standard(const uint8_t (&scales_l)[8][4], const uint8_t (&scales_h)[16], int64_t k,
                          uint8_t (&packed)[12]) {
  for (int run = 0; run < 4; ++run) {
    const int upper = plane_field<4>(scales_h, 4 * run + k),
              upper_4 = plane_field<4>(scales_h, 4 * (run + 4) + k);
    const int low = scales_l[run][k], low_4 = scales_l[run + 4][k];
    packed[run] = static_cast<uint8_t>((low & 15) | (upper & 3) << 4 | (upper_4 & 3) << 6);
    packed[4 + run] = static_cast<uint8_t>(low >> 4 | (upper >> 2) << 4 | (upper_4 >> 2) << 6);
    packed[8 + run] = static_cast<uint8_t>(low_4);
  }
}

// Q4_K and Q5_K: two runs of 32 in nibble planes of 32 bytes.
void runs_to_standard(const uint8_t (&qs)[8][2][2][4][4], int64_t k, uint8_t (&packed)[4][32]) {
  uint8_t level[2][32];
  for (int pair = 0; pair < 4; ++pair) {
    nibble_levels(qs[2 * pair], k, level[0]);
    nibble_levels(qs[2 * pair + 1], k, level[1]);
    for (int j = 0; j < 32; ++j) packed[pair][j] = static_cast<uint8_t>(level[0][j] | level[1][j] << 4);
  }
}

struct Q4_K_R4 {
  using Standard = Q4_K;
  static constexpr int rows = 4;
  uint8_t d[4][2], dmin[4][2], scales_h[16], scales_l[8][4], qs[8][2][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memcpy(out.dmin, dmin[k], 2);
    k_scales_to_standard(scales_l, scales_h, k, out.scales);
    runs_to_standard(qs, k, out.qs);
  }
};

struct Q5_K_R4 {
  using Standard = Q5_K;
  static constexpr int rows = 4;
  uint8_t d[4][2], dmin[4][2], scales_h[16], scales_l[8][4], qh[8][4][4], qs[8][2][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memcpy(out.dmin, dmin[k], 2);
    k_scales_to_standard(scales_l, scales_h, k, out.scales);
    std::memset(out.qh, 0, sizeof out.qh);
    for (int run = 0; run < 8; ++run)
      for (int w = 0; w < 32; ++w) {
        const int a = w >> 4, h = w >> 3 & 1, b = w >> 2 & 1, i = w & 3;
        out.qh[w] |= static_cast<uint8_t>((qh[run][k][i] >> (4 * a + 2 * b + h) & 1) << run);
      }
    runs_to_standard(qs, k, out.qs);
  }
};

struct Q6_K_R4 {
  using Standard = Q6_K;
  static constexpr int rows = 4;
  uint8_t d[4][2];
  int8_t scales[16][4];
  uint8_t qh[8][2][4][4], ql[8][2][2][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int run = 0; run < 16; ++run) out.scales[run] = scales[run][k];
    uint8_t level[8][32];
    for (int run = 0; run < 8; ++run) nibble_levels(ql[run], k, level[run]);
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 64; ++j)
        out.ql[half][j] = static_cast<uint8_t>(level[4 * half + j / 32][j % 32] |
                                               level[4 * half + 2 + j / 32][j % 32] << 4);
    std::memset(out.qh, 0, sizeof out.qh);
    for (int run = 0; run < 8; ++run)
      for (int w = 0; w < 32; ++w) {
        const int a = w >> 4, h = w >> 3 & 1, b = w >> 2 & 1, i = w & 3;
        out.qh[run / 4][w] |= static_cast<uint8_t>((qh[run][a][k][i] >> (4 * b + 2 * h) & 3) << run % 4 * 2);
      }
  }
};

struct IQ4_XS_R8 {
  using Standard = IQ4_XS;
  static constexpr int rows = 8;
  uint8_t d[8][2], scales_h[16], scales_l[32], qs[8][4][8][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memset(out.scales_l, 0, sizeof out.scales_l);
    uint32_t high = 0;
    for (int run = 0; run < 8; ++run) {
      out.scales_l[run / 2] |= static_cast<uint8_t>(plane_field<4>(scales_l, 8 * run + k) << run % 2 * 4);
      high |= static_cast<uint32_t>(plane_field<2>(scales_h, 8 * run + k)) << 2 * run;
      for (int w = 0; w < 16; ++w) {
        const int shift = w & 4, i = w & 3;
        out.qs[run][w] = static_cast<uint8_t>((qs[run][w >> 3][k][i] >> shift & 15) |
                                              (qs[run][2 + (w >> 3)][k][i] >> shift & 15) << 4);
      }
    }
    store16(out.scales_h, high);
  }
};

// IQ2_XXS and IQ3_XXS: bit 0 of the four bytes is the scale, the other seven, t, the signs t ^ (t >> 1).
uint32_t signs_and_scale(const uint8_t (&packed)[4]) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t t = packed[i] & 254u;
    word |= ((t ^ t >> 1) & 127) << 7 * i | (packed[i] & 1u) << (28 + i);
  }
  return word;
}

struct IQ2_XXS_R4 {
  using Standard = IQ2_XXS;
  static constexpr int rows = 4;
  uint8_t d[4][2], signs[8][4][4], qs[8][4][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int run = 0; run < 8; ++run) {
      std::memcpy(out.runs[run].index, qs[run][k], 4);
      store32(out.runs[run].signs, signs_and_scale(signs[run][k]));
    }
  }
};

struct IQ3_XXS_R4 {
  using Standard = IQ3_XXS;
  static constexpr int rows = 4;
  uint8_t d[4][2], signs[8][4][4], qs[8][4][8];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int run = 0; run < 8; ++run) {
      std::memcpy(out.qs + 8 * run, qs[run][k], 8);
      store32(out.signs[run], signs_and_scale(signs[run][k]));
    }
  }
};

struct IQ2_XS_R4 {
  using Standard = IQ2_XS;
  static constexpr int rows = 4;
  uint8_t d[4][2], qs[8][4][4][2], scales[8][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int run = 0; run < 8; ++run) {
      out.scales[run] = scales[run][k];
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = load16(qs[run][k][i]), s = word >> 9;
        store16(out.qs[4 * run + i], (word & 511) | ((s ^ s << 1) & 127) << 9);
      }
    }
  }
};

struct IQ2_S_R4 {
  using Standard = IQ2_S;
  static constexpr int rows = 4;
  uint8_t d[4][2], qs[8][4][4], qh[8][4], signs[8][4][4], scales[8][4];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    for (int run = 0; run < 8; ++run) {
      std::memcpy(out.qs + 4 * run, qs[run][k], 4);
      std::memcpy(out.signs + 4 * run, signs[run][k], 4);
      out.qh[run] = qh[run][k];
      out.scales[run] = scales[run][k];
    }
  }
};

struct IQ3_S_R4 {
  using Standard = IQ3_S;
  static constexpr int rows = 4;
  uint8_t d[4][2], qs[8][4][2][4], qh[8][4], signs[8][4][4], scales[16];
  void take_row(int64_t k, Standard& out) const {
    std::memcpy(out.d, d[k], 2);
    std::memset(out.scales, 0, sizeof out.scales);
    std::memset(out.signs, 0, sizeof out.signs);
    for (int run = 0; run < 8; ++run) {
      out.qh[run] = qh[run][k];
      out.scales[run / 2] |= static_cast<uint8_t>(plane_field<4>(scales, 4 * run + k) << run % 2 * 4);
      for (int i = 0; i < 8; ++i) out.qs[8 * run + i] = qs[run][i % 4][i / 4][k];
      for (int w = 0; w < 32; ++w)
        out.signs[4 * run + w / 8] |= static_cast<uint8_t>((signs[run][k][w & 3] >> (w >> 2) & 1) << w % 8);
    }
  }
};

template <class Mixed>
void group_row(const uint8_t* group, int64_t k, float* dst, int64_t n) {
  const auto* mixed = reinterpret_cast<const Mixed*>(group);
  for (int64_t done = 0; done < n; done += Mixed::Standard::elements, ++mixed) {
    typename Mixed::Standard block;
    mixed->take_row(k, block);
    block.decode(dst + done);
  }
}

// Pairs of columns of 16 rows.
void bf16_r16_row(const uint8_t* group, int64_t k, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += 2) {
    const uint32_t pair = load32(group + 32 * i + 4 * k);
    dst[i] = as_float(pair << 16);
    dst[i + 1] = as_float(pair & 0xffff0000u);
  }
}

// Blocks of 32, one float16 scale a row in front of the group.
struct IQ1_S_R4 {
  uint8_t qs[4][4], qh[4][2];
};

void iq1_s_r4_row(const uint8_t* group, int64_t k, float* dst, int64_t n) {
  const float all = half_at(group + 2 * k);
  const auto* block = reinterpret_cast<const IQ1_S_R4*>(group + 8);
  for (int64_t done = 0; done < n; done += 32, ++block) {
    const uint32_t word = load16(block->qh[k]);
    const float scale = all * static_cast<float>((word >> 12 & 7) * 2 + 1),
                delta = word >> 15 ? -0.125f : 0.125f;
    for (int i = 0; i < 4; ++i)
      shifted_eight(scale, block->qs[i][k] | (word >> 3 * i & 7) << 8, delta, dst + done + 8 * i);
  }
}

struct IQ1_M_R4 {
  uint8_t qs[4][4], qh[2][4], scales[4];
};

void iq1_m_r4_row(const uint8_t* group, int64_t k, float* dst, int64_t n) {
  const float all = half_at(group + 2 * k);
  const auto* block = reinterpret_cast<const IQ1_M_R4*>(group + 8);
  for (int64_t done = 0; done < n; done += 32, ++block)
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = block->qh[i / 2][k] >> i % 2 * 4 & 15;
      const float scale = all * static_cast<float>(block->scales[k] >> i / 2 * 4 & 15);
      shifted_eight(scale, block->qs[i][k] | (nibble & 7) << 8, nibble & 8 ? -0.125f : 0.125f,
                    dst + done + 8 * i);
    }
}

template <class Mixed>
constexpr TypeLayout interleaved(int32_t id) {
  using Standard = typename Mixed::Standard;
  static_assert(sizeof(Mixed) == Mixed::rows * sizeof(Standard));
  return {id, Standard::elements, sizeof(Standard), Mixed::rows, 0, nullptr, group_row<Mixed>};
}

constexpr TypeLayout layouts[] = {
    interleaved<Q4_0_R8>(202),
    interleaved<Q5_0_R4>(206),
    interleaved<Q8_0_R8>(208),
    interleaved<Q2_K_R4>(210),
    interleaved<Q3_K_R4>(211),
    interleaved<Q4_K_R4>(212),
    interleaved<Q5_K_R4>(213),
    interleaved<Q6_K_R4>(214),
    interleaved<IQ2_XXS_R4>(216),
    interleaved<IQ2_XS_R4>(217),
    interleaved<IQ3_XXS_R4>(218),
    {219, 32, sizeof(IQ1_S_R4) / 4, 4, 2, nullptr, iq1_s_r4_row},
    interleaved<IQ4_NL_R4>(220),
    interleaved<IQ3_S_R4>(221),
    interleaved<IQ2_S_R4>(222),
    interleaved<IQ4_XS_R8>(223),
    {229, 32, sizeof(IQ1_M_R4) / 4, 4, 2, nullptr, iq1_m_r4_row},
    {230, 2, 4, 16, 0, nullptr, bf16_r16_row},
    interleaved<Q6_0_R4>(233),
    interleaved<MXFP4_R8>(353),
};

constexpr int kTypesInMemory = [] {
  int count = 0;
  for_each_side_by_side([&](auto, int32_t) { count++; });
  return count;
}();

constexpr auto in_memory = [] {
  std::array<TypeLayout, kTypesInMemory> all{};
  int count = 0;
  for_each_side_by_side([&](auto type, int32_t id) {
    all[count++] = interleaved<SideBySide<typename decltype(type)::type>>(side_by_side_id(id));
  });
  return all;
}();

}  // namespace

TypeLayouts interleaved_layouts() { return {std::begin(layouts), std::end(layouts)}; }
TypeLayouts side_by_side_layouts() { return {in_memory.data(), in_memory.data() + in_memory.size()}; }

}  // namespace kvfold
