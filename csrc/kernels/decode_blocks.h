// The blocks of every standard type as structs of bytes, which any address may hold, and their decoders. A
// format is explained at the decoder of the same name in src/kvfold/quant/decode.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "blocks are read as little-endian numbers"
#endif

namespace kvfold::blocks {

#include "kernels/codebooks.inc"

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t load16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline uint32_t load32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline void store16(uint8_t* p, uint32_t value) {
  const auto word = static_cast<uint16_t>(value);
  std::memcpy(p, &word, sizeof word);
}

inline void store32(uint8_t* p, uint32_t value) { std::memcpy(p, &value, sizeof value); }

// float16 -> float32. A subnormal is a whole number of 2^-24ths; otherwise the exponent moves by 112, and
// once more from 31 to 255 where it means infinity or NaN. Masks, not conditions: with those GCC 12 does not
// vectorise the loop over a row: 1.9 GB/s instead of 8.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t tiny_bits;
  std::memcpy(&tiny_bits, &tiny, sizeof tiny_bits);
  const uint32_t is_tiny = 0u - static_cast<uint32_t>(magnitude < 0x0400);
  const uint32_t is_special = 0u - static_cast<uint32_t>(magnitude >= 0x7c00);
  const uint32_t moved = (magnitude << 13) + (112u << 23) + (is_special & 112u << 23);
  return as_float(sign | (tiny_bits & is_tiny) | (moved & ~is_tiny));
}

inline float half_at(const uint8_t* p) { return half_to_float(load16(p)); }

// F8_E4M3fn of every byte. NaN is all ones under either sign.
constexpr std::array<float, 256> make_e4m3() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = exponent == 0 ? static_cast<float>(mantissa) : static_cast<float>(8 + mantissa);
    for (int i = 1; i < exponent; ++i) value *= 2.0f;
    value *= 0x1p-9f;
    if (exponent == 15 && mantissa == 7) value = __builtin_nanf("");
    table[code] = code < 128 ? value : -value;
  }
  return table;
}
inline constexpr std::array<float, 256> e4m3_values = make_e4m3();

// Half of each scale of NVFP4: E4M3 without sign, where 0x7f alone means 0.
constexpr std::array<float, 256> make_ue4m3_halves() {
  std::array<float, 256> table{};
  for (int code = 0; code < 0x7f; ++code) table[code] = table[code + 128] = e4m3_values[code] * 0.5f;
  table[0x7f] = 0.0f;
  table[0xff] = 240.0f;
  return table;
}
inline constexpr std::array<float, 256> ue4m3_halves = make_ue4m3_halves();

inline constexpr float nonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                        1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr float e2m1_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// A codebook of n entries of `weights` levels, as small as it gets: 16 kB for the largest, half an L1 cache.
template <size_t weights, size_t n>
constexpr std::array<std::array<int8_t, weights>, n> unpack(const uint16_t (&packed)[n],
                                                            const int8_t* magnitudes) {
  constexpr int bits = 16 / weights;
  std::array<std::array<int8_t, weights>, n> entries{};
  for (size_t e = 0; e < n; ++e)
    for (size_t w = 0; w < weights; ++w)
      entries[e][w] = magnitudes[packed[e] >> bits * w & ((1 << bits) - 1)];
  return entries;
}
inline constexpr auto iq2xxs_book = unpack<8>(k_iq2xxs_packed, k_iq2xxs_magnitudes);
inline constexpr auto iq2xs_book = unpack<8>(k_iq2xs_packed, k_iq2xs_magnitudes);
inline constexpr auto iq2s_book = unpack<8>(k_iq2s_packed, k_iq2s_magnitudes);
inline constexpr auto iq3xxs_book = unpack<4>(k_iq3xxs_packed, k_iq3xxs_magnitudes);
inline constexpr auto iq3s_book = unpack<4>(k_iq3s_packed, k_iq3s_magnitudes);
inline constexpr auto iq1s_book = unpack<8>(k_iq1s_packed, k_iq1s_magnitudes);

// +1 or -1 for each bit of a byte of signs. 8 kB.
constexpr std::array<std::array<float, 8>, 256> make_signs() {
  std::array<std::array<float, 8>, 256> table{};
  for (int byte = 0; byte < 256; ++byte)
    for (int i = 0; i < 8; ++i) table[byte][i] = byte >> i & 1 ? -1.0f : 1.0f;
  return table;
}
inline constexpr auto sign_values = make_signs();

// Seven stored signs and the eighth that makes the number of minus signs even.
inline uint8_t even_signs(uint32_t seven) {
  uint32_t parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return static_cast<uint8_t>(seven | (parity & 1) << 7);
}

// y[i] = scale * level[i] * sign[i], for 8 weights.
inline void signed_eight(float scale, const int8_t* level, uint8_t signs, float* __restrict y) {
  for (int i = 0; i < 8; ++i) y[i] = scale * static_cast<float>(level[i]) * sign_values[signs][i];
}

// The same for 8 weights of two entries of 4.
inline void signed_four_four(float scale, const int8_t* first, const int8_t* second, uint8_t signs,
                             float* __restrict y) {
  for (int i = 0; i < 4; ++i) y[i] = scale * static_cast<float>(first[i]) * sign_values[signs][i];
  for (int i = 0; i < 4; ++i) y[4 + i] = scale * static_cast<float>(second[i]) * sign_values[signs][4 + i];
}

// y[i] = scale * (level[i] + delta), for the 8 weights of an entry of IQ1_S's codebook.
inline void shifted_eight(float scale, uint32_t index, float delta, float* __restrict y) {
  for (int i = 0; i < 8; ++i) y[i] = scale * (static_cast<float>(iq1s_book[index][i]) + delta);
}

// Nibbles of n bytes through a table of 16, in planes.
template <int n>
inline void nibbles_through(const float* levels, float scale, const uint8_t* qs, float* __restrict y) {
  float scaled[16];
  for (int i = 0; i < 16; ++i) scaled[i] = scale * levels[i];
  for (int j = 0; j < n; ++j) y[j] = scaled[qs[j] & 15];
  for (int j = 0; j < n; ++j) y[n + j] = scaled[qs[j] >> 4];
}

struct Q4_0 {
  static constexpr int elements = 32;
  uint8_t d[2], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int j = 0; j < 16; ++j) y[j] = scale * static_cast<float>((qs[j] & 15) - 8);
    for (int j = 0; j < 16; ++j) y[16 + j] = scale * static_cast<float>((qs[j] >> 4) - 8);
  }
};

struct Q4_1 {
  static constexpr int elements = 32;
  uint8_t d[2], m[2], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d), minimum = half_at(m);
    for (int j = 0; j < 16; ++j) y[j] = scale * static_cast<float>(qs[j] & 15) + minimum;
    for (int j = 0; j < 16; ++j) y[16 + j] = scale * static_cast<float>(qs[j] >> 4) + minimum;
  }
};

struct Q5_0 {
  static constexpr int elements = 32;
  uint8_t d[2], qh[4], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    const uint32_t high = load32(qh);
    for (int j = 0; j < 16; ++j)
      y[j] = scale * static_cast<float>(static_cast<int32_t>((qs[j] & 15) | (high >> j & 1) << 4) - 16);
    for (int j = 0; j < 16; ++j)
      y[16 + j] =
          scale * static_cast<float>(static_cast<int32_t>(qs[j] >> 4 | (high >> (16 + j) & 1) << 4) - 16);
  }
};

struct Q5_1 {
  static constexpr int elements = 32;
  uint8_t d[2], m[2], qh[4], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d), minimum = half_at(m);
    const uint32_t high = load32(qh);
    for (int j = 0; j < 16; ++j)
      y[j] = scale * static_cast<float>(static_cast<int32_t>((qs[j] & 15) | (high >> j & 1) << 4)) + minimum;
    for (int j = 0; j < 16; ++j)
      y[16 + j] = scale * static_cast<float>(static_cast<int32_t>(qs[j] >> 4 | (high >> (16 + j) & 1) << 4)) +
                  minimum;
  }
};

struct Q6_0 {
  static constexpr int elements = 32;
  uint8_t d[2], qh[8], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 8; ++j) {
        const int low = qs[8 * half + j], high = qh[j] >> 4 * half;
        y[8 * half + j] = scale * static_cast<float>(((low & 15) | (high & 3) << 4) - 32);
        y[16 + 8 * half + j] = scale * static_cast<float>((low >> 4 | (high & 12) << 2) - 32);
      }
  }
};

struct Q8_0 {
  static constexpr int elements = 32;
  uint8_t d[2];
  int8_t qs[32];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int j = 0; j < 32; ++j) y[j] = scale * static_cast<float>(qs[j]);
  }
};

struct Q8_1 {
  static constexpr int elements = 32;
  uint8_t d[2], sum[2];
  int8_t qs[32];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int j = 0; j < 32; ++j) y[j] = scale * static_cast<float>(qs[j]);
  }
};

struct Q8_K {
  static constexpr int elements = 256;
  uint8_t d[4];
  int8_t qs[256];
  uint8_t sums[32];
  void decode(float* __restrict y) const {
    const float scale = as_float(load32(d));
    for (int j = 0; j < 256; ++j) y[j] = scale * static_cast<float>(qs[j]);
  }
};

struct Q1_0 {
  static constexpr int elements = 128;
  uint8_t d[2], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int j = 0; j < 16; ++j)
      for (int i = 0; i < 8; ++i) y[8 * j + i] = -scale * sign_values[qs[j]][i];
  }
};

struct Q2_0 {
  static constexpr int elements = 64;
  uint8_t d[2], qs[16];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int j = 0; j < 16; ++j)
      for (int i = 0; i < 4; ++i) y[4 * j + i] = scale * static_cast<float>((qs[j] >> 2 * i & 3) - 1);
  }
};

struct TQ1_0 {
  static constexpr int elements = 256;
  uint8_t qs[48], qh[4], d[2];

  template <int n, int count>
  static void trits(float scale, const uint8_t* packed, float* __restrict y) {
    constexpr int powers[5] = {1, 3, 9, 27, 81};
    for (int p = 0; p < count; ++p)
      for (int j = 0; j < n; ++j) {
        const int fraction = packed[j] * powers[p] & 255;
        y[n * p + j] = scale * static_cast<float>((fraction * 3 >> 8) - 1);
      }
  }

  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    trits<32, 5>(scale, qs, y);
    trits<16, 5>(scale, qs + 32, y + 160);
    trits<4, 4>(scale, qh, y + 240);
  }
};

struct TQ2_0 {
  static constexpr int elements = 256;
  uint8_t qs[2][32], d[2];
  void decode(float* __restrict y) const {
    const float scale = half_at(d);
    for (int half = 0; half < 2; ++half)
      for (int p = 0; p < 4; ++p)
        for (int j = 0; j < 32; ++j)
          y[128 * half + 32 * p + j] = scale * static_cast<float>((qs[half][j] >> 2 * p & 3) - 1);
  }
};

struct MXFP4 {
  static constexpr int elements = 32;
  uint8_t e, qs[16];
  void decode(float* __restrict y) const {
    const uint32_t half_scale = e < 2 ? 0x200000u << e : static_cast<uint32_t>(e - 1) << 23;
    nibbles_through<16>(e2m1_doubled, as_float(half_scale), qs, y);
  }
};

struct NVFP4 {
  static constexpr int elements = 64;
  uint8_t d[4], qs[4][8];
  void decode(float* __restrict y) const {
    for (int run = 0; run < 4; ++run)
      nibbles_through<8>(e2m1_doubled, ue4m3_halves[d[run]], qs[run], y + 16 * run);
  }
};

struct Q2_K {
  static constexpr int elements = 256;
  uint8_t scales[16], qs[2][32], d[2], dmin[2];
  void decode(float* __restrict y) const {
    const float all = half_at(d), all_min = half_at(dmin);
    for (int run = 0; run < 16; ++run) {
      const float scale = all * static_cast<float>(scales[run] & 15);
      const float minimum = all_min * static_cast<float>(scales[run] >> 4);
      const uint8_t* q = qs[run / 8] + 16 * (run % 2);
      const int shift = run % 8 / 2 * 2;
      for (int j = 0; j < 16; ++j) y[16 * run + j] = scale * static_cast<float>(q[j] >> shift & 3) - minimum;
    }
  }
};

struct Q3_K {
  static constexpr int elements = 256;
  uint8_t hmask[32], qs[2][32], scales[12], d[2];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 16; ++run) {
      const int low = scales[run % 8] >> run / 8 * 4 & 15, high = scales[8 + run % 4] >> run / 4 * 2 & 3;
      const float scale = all * static_cast<float>((low | high << 4) - 32);
      const uint8_t* q = qs[run / 8] + 16 * (run % 2);
      const uint8_t* h = hmask + 16 * (run % 2);
      const int shift = run % 8 / 2 * 2, bit = run / 2;
      for (int j = 0; j < 16; ++j)
        y[16 * run + j] = scale * static_cast<float>(((q[j] >> shift & 3) | (h[j] >> bit & 1) << 2) - 4);
    }
  }
};

// Scale and minimum of a run of 32 of Q4_K and Q5_K, from the 12 bytes that pack eight of both in 6 bits
// each.
struct ScaleAndMin {
  int scale, minimum;
};
inline ScaleAndMin k_scale(const uint8_t* packed, int run) {
  if (run < 4) return {packed[run] & 63, packed[4 + run] & 63};
  const int low = packed[4 + run];
  return {(low & 15) | packed[run - 4] >> 6 << 4, low >> 4 | packed[run] >> 6 << 4};
}

struct Q4_K {
  static constexpr int elements = 256;
  uint8_t d[2], dmin[2], scales[12], qs[4][32];
  void decode(float* __restrict y) const {
    const float all = half_at(d), all_min = half_at(dmin);
    for (int run = 0; run < 8; ++run) {
      const ScaleAndMin k = k_scale(scales, run);
      const float scale = all * static_cast<float>(k.scale),
                  minimum = all_min * static_cast<float>(k.minimum);
      const uint8_t* q = qs[run / 2];
      const int shift = run % 2 * 4;
      for (int j = 0; j < 32; ++j) y[32 * run + j] = scale * static_cast<float>(q[j] >> shift & 15) - minimum;
    }
  }
};

struct Q5_K {
  static constexpr int elements = 256;
  uint8_t d[2], dmin[2], scales[12], qh[32], qs[4][32];
  void decode(float* __restrict y) const {
    const float all = half_at(d), all_min = half_at(dmin);
    for (int run = 0; run < 8; ++run) {
      const ScaleAndMin k = k_scale(scales, run);
      const float scale = all * static_cast<float>(k.scale),
                  minimum = all_min * static_cast<float>(k.minimum);
      const uint8_t* q = qs[run / 2];
      const int shift = run % 2 * 4;
      for (int j = 0; j < 32; ++j)
        y[32 * run + j] =
            scale * static_cast<float>((q[j] >> shift & 15) | (qh[j] >> run & 1) << 4) - minimum;
    }
  }
};

struct Q6_K {
  static constexpr int elements = 256;
  uint8_t ql[2][64], qh[2][32];
  int8_t scales[16];
  uint8_t d[2];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 16; ++run) {
      const float scale = all * static_cast<float>(scales[run]);
      const uint8_t* low = ql[run / 8] + run % 4 * 16;
      const uint8_t* high = qh[run / 8] + run % 2 * 16;
      const int low_shift = run % 8 / 4 * 4, high_shift = run % 8 / 2 * 2;
      for (int j = 0; j < 16; ++j)
        y[16 * run + j] =
            scale * static_cast<float>(((low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4) - 32);
    }
  }
};

struct IQ4_NL {
  static constexpr int elements = 32;
  uint8_t d[2], qs[16];
  void decode(float* __restrict y) const { nibbles_through<16>(nonlinear, half_at(d), qs, y); }
};

struct IQ4_XS {
  static constexpr int elements = 256;
  uint8_t d[2], scales_h[2], scales_l[4], qs[8][16];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    const int high = load16(scales_h);
    for (int run = 0; run < 8; ++run) {
      const int scale = (scales_l[run / 2] >> run % 2 * 4 & 15) | (high >> 2 * run & 3) << 4;
      nibbles_through<16>(nonlinear, all * static_cast<float>(scale - 32), qs[run], y + 32 * run);
    }
  }
};

struct IQ2_XXS {
  static constexpr int elements = 256;
  uint8_t d[2];
  struct {
    uint8_t index[4], signs[4];
  } runs[8];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (const auto& run : runs) {
      const uint32_t packed = load32(run.signs);
      const float scale = all * (0.5f + static_cast<float>(packed >> 28)) * 0.25f;
      for (int i = 0; i < 4; ++i, y += 8)
        signed_eight(scale, iq2xxs_book[run.index[i]].data(), even_signs(packed >> 7 * i & 127), y);
    }
  }
};

struct IQ2_XS {
  static constexpr int elements = 256;
  uint8_t d[2], qs[32][2], scales[8];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 16; ++run) {
      const float scale = all * (0.5f + static_cast<float>(scales[run / 2] >> run % 2 * 4 & 15)) * 0.25f;
      for (int i = 0; i < 2; ++i, y += 8) {
        const uint32_t word = load16(qs[2 * run + i]);
        signed_eight(scale, iq2xs_book[word & 511].data(), even_signs(word >> 9), y);
      }
    }
  }
};

struct IQ2_S {
  static constexpr int elements = 256;
  uint8_t d[2], qs[32], signs[32], qh[8], scales[8];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 16; ++run) {
      const float scale = all * (0.5f + static_cast<float>(scales[run / 2] >> run % 2 * 4 & 15)) * 0.25f;
      for (int i = 2 * run; i < 2 * run + 2; ++i, y += 8)
        signed_eight(scale, iq2s_book[qs[i] | (qh[i / 4] >> i % 4 * 2 & 3) << 8].data(), signs[i], y);
    }
  }
};

struct IQ3_XXS {
  static constexpr int elements = 256;
  uint8_t d[2], qs[64], signs[8][4];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 8; ++run) {
      const uint32_t packed = load32(signs[run]);
      const float scale = all * (0.5f + static_cast<float>(packed >> 28)) * 0.5f;
      const uint8_t* q = qs + 8 * run;
      for (int i = 0; i < 4; ++i, y += 8)
        signed_four_four(scale, iq3xxs_book[q[2 * i]].data(), iq3xxs_book[q[2 * i + 1]].data(),
                         even_signs(packed >> 7 * i & 127), y);
    }
  }
};

struct IQ3_S {
  static constexpr int elements = 256;
  uint8_t d[2], qs[64], qh[8], signs[32], scales[4];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 8; ++run) {
      const float scale = all * static_cast<float>((scales[run / 2] >> run % 2 * 4 & 15) * 2 + 1);
      const uint8_t* q = qs + 8 * run;
      for (int i = 0; i < 4; ++i, y += 8)
        signed_four_four(scale, iq3s_book[q[2 * i] | (qh[run] >> 2 * i & 1) << 8].data(),
                         iq3s_book[q[2 * i + 1] | (qh[run] >> (2 * i + 1) & 1) << 8].data(),
                         signs[4 * run + i], y);
    }
  }
};

struct IQ1_S {
  static constexpr int elements = 256;
  uint8_t d[2], qs[32], qh[8][2];
  void decode(float* __restrict y) const {
    const float all = half_at(d);
    for (int run = 0; run < 8; ++run) {
      const uint32_t word = load16(qh[run]);
      const float scale = all * static_cast<float>((word >> 12 & 7) * 2 + 1),
                  delta = word >> 15 ? -0.125f : 0.125f;
      for (int i = 0; i < 4; ++i, y += 8)
        shifted_eight(scale, qs[4 * run + i] | (word >> 3 * i & 7) << 8, delta, y);
    }
  }
};

struct IQ1_M {
  static constexpr int elements = 256;
  uint8_t qs[32], qh[16], scales[4][2];
  void decode(float* __restrict y) const {
    uint32_t words[4], d = 0;
    for (int i = 0; i < 4; ++i) {
      words[i] = load16(scales[i]);
      d |= words[i] >> 12 << 4 * i;
    }
    const float all = half_to_float(static_cast<uint16_t>(d));
    for (int i = 0; i < 32; ++i, y += 8) {
      const uint32_t nibble = qh[i / 2] >> i % 2 * 4 & 15;
      const float scale = all * static_cast<float>((words[i / 8] >> i / 2 % 4 * 3 & 7) * 2 + 1);
      shifted_eight(scale, qs[i] | (nibble & 7) << 8, nibble & 8 ? -0.125f : 0.125f, y);
    }
  }
};

}  // namespace kvfold::blocks

namespace kvfold {

// What stands for a block in a list of types.
template <class T>
struct Type {
  using type = T;
};

}  // namespace kvfold
