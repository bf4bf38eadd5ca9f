// Every type whose weights are whole numbers times scales, taken apart: W = scale * (code - zero) - minimum,
// with a scale (and minimum) for each run of 16 or 32 weights. Exact: products below use the file's own
// scales.
//
// Levels come out of the type's one decoder (decode_blocks.h), run on a copy of the block whose scales are
// set to one: a format is spelled out once. That costs about ten operations a weight, so types that matter
// have vector code in simd/ besides.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/decode_blocks.h"

namespace kvfold {

// A block type T of decode_blocks.h taken apart.
//   kRun       weights that share a scale: 16 or 32
//   kZero      what is added to levels so that none is negative. kWide: levels need all of int8
//   kMost      the largest code, level + kZero; of no meaning with kWide
//   kUnit      levels = decode of a block of unit scales * kUnit
//   set_unit   makes all scales of a block one and its minimums zero
//   scales     [elements / kRun] of them; minimums where kHasMin
template <class T>
struct Parts;

namespace parts {

constexpr uint8_t kHalfOne[2] = {0x00, 0x3c};  // 1.0 as a float16

inline void set_one(uint8_t* half) { std::memcpy(half, kHalfOne, 2); }

template <class T, int zero>
struct OneScale {  // float16 d for the whole block
  static constexpr int kRun = 32, kZero = zero, kMost = zero == 1 ? 3 : 2 * zero - 1;
  static constexpr bool kWide = zero == 128, kHasMin = false;
  static constexpr float kUnit = 1.0f;
  static void set_unit(T& b) { set_one(b.d); }
  static void scales(const T& b, float* scale, float*) {
    const float d = blocks::half_at(b.d);
    for (int run = 0; run < T::elements / kRun; ++run) scale[run] = d;
  }
};

template <class T, int most>
struct OneScaleAndMin {
  static constexpr int kRun = 32, kZero = 0, kMost = most;
  static constexpr bool kWide = false, kHasMin = true;
  static constexpr float kUnit = 1.0f;
  static void set_unit(T& b) {
    set_one(b.d);
    std::memset(b.m, 0, sizeof b.m);
  }
  static void scales(const T& b, float* scale, float* minimum) {
    scale[0] = blocks::half_at(b.d);
    minimum[0] = -blocks::half_at(b.m);
  }
};

template <class T, int most>
struct RunsOf32 {  // Q4_K, Q5_K
  static constexpr int kRun = 32, kZero = 0, kMost = most;
  static constexpr bool kWide = false, kHasMin = true;
  static constexpr float kUnit = 1.0f;
  static void set_unit(T& b) {
    static constexpr uint8_t ones[12] = {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1};
    set_one(b.d);
    std::memset(b.dmin, 0, sizeof b.dmin);
    std::memcpy(b.scales, ones, sizeof ones);
  }
  static void scales(const T& b, float* scale, float* minimum) {
    const float all = blocks::half_at(b.d), all_min = blocks::half_at(b.dmin);
    for (int run = 0; run < 8; ++run) {
      const blocks::ScaleAndMin k = blocks::k_scale(b.scales, run);
      scale[run] = all * static_cast<float>(k.scale);
      minimum[run] = all_min * static_cast<float>(k.minimum);
    }
  }
};

// The codebook types: 4-bit scales s of runs, weight = d * (s + 1/2) * factor * level.
template <class T, int run_weights>
struct HalfSteps {
  static constexpr int kRun = run_weights, kZero = 64, kMost = 127;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 8.0f;  // of (0 + 1/2) / 4
  static void set_unit(T& b) {
    set_one(b.d);
    std::memset(b.scales, 0, sizeof b.scales);
  }
  static void scales(const T& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 16; ++run)
      scale[run] = all * (0.5f + static_cast<float>(b.scales[run / 2] >> run % 2 * 4 & 15)) * 0.25f;
  }
};

}  // namespace parts

template <>
struct Parts<blocks::Q4_0> : parts::OneScale<blocks::Q4_0, 8> {};
template <>
struct Parts<blocks::Q5_0> : parts::OneScale<blocks::Q5_0, 16> {};
template <>
struct Parts<blocks::Q6_0> : parts::OneScale<blocks::Q6_0, 32> {};
template <>
struct Parts<blocks::Q8_0> : parts::OneScale<blocks::Q8_0, 128> {};
template <>
struct Parts<blocks::Q8_1> : parts::OneScale<blocks::Q8_1, 128> {};
template <>
struct Parts<blocks::IQ4_NL> : parts::OneScale<blocks::IQ4_NL, 128> {};
template <>
struct Parts<blocks::Q1_0> : parts::OneScale<blocks::Q1_0, 1> {};
template <>
struct Parts<blocks::Q2_0> : parts::OneScale<blocks::Q2_0, 1> {};
template <>
struct Parts<blocks::TQ1_0> : parts::OneScale<blocks::TQ1_0, 1> {};
template <>
struct Parts<blocks::TQ2_0> : parts::OneScale<blocks::TQ2_0, 1> {};
template <>
struct Parts<blocks::Q4_1> : parts::OneScaleAndMin<blocks::Q4_1, 15> {};
template <>
struct Parts<blocks::Q5_1> : parts::OneScaleAndMin<blocks::Q5_1, 31> {};
template <>
struct Parts<blocks::Q4_K> : parts::RunsOf32<blocks::Q4_K, 15> {};
template <>
struct Parts<blocks::Q5_K> : parts::RunsOf32<blocks::Q5_K, 31> {};
template <>
struct Parts<blocks::IQ2_XS> : parts::HalfSteps<blocks::IQ2_XS, 16> {};
template <>
struct Parts<blocks::IQ2_S> : parts::HalfSteps<blocks::IQ2_S, 16> {};

template <>
struct Parts<blocks::Q8_K> : parts::OneScale<blocks::Q8_K, 128> {  // d is a float32
  static void set_unit(blocks::Q8_K& b) {
    const float one = 1.0f;
    std::memcpy(b.d, &one, sizeof one);
  }
  static void scales(const blocks::Q8_K& b, float* scale, float*) {
    for (int run = 0; run < 8; ++run) scale[run] = blocks::as_float(blocks::load32(b.d));
  }
};

template <>
struct Parts<blocks::MXFP4> : parts::OneScale<blocks::MXFP4, 16> {
  static void set_unit(blocks::MXFP4& b) { b.e = 128; }
  static void scales(const blocks::MXFP4& b, float* scale, float*) {
    scale[0] = blocks::as_float(b.e < 2 ? 0x200000u << b.e : static_cast<uint32_t>(b.e - 1) << 23);
  }
};

template <>
struct Parts<blocks::NVFP4> : parts::OneScale<blocks::NVFP4, 16> {
  static constexpr int kRun = 16;
  static void set_unit(blocks::NVFP4& b) { std::memset(b.d, 0x40, sizeof b.d); }  // 2.0, halved
  static void scales(const blocks::NVFP4& b, float* scale, float*) {
    for (int run = 0; run < 4; ++run) scale[run] = blocks::ue4m3_halves[b.d[run]];
  }
};

template <>
struct Parts<blocks::Q2_K> {
  static constexpr int kRun = 16, kZero = 0, kMost = 3;
  static constexpr bool kWide = false, kHasMin = true;
  static constexpr float kUnit = 1.0f;
  static void set_unit(blocks::Q2_K& b) {
    parts::set_one(b.d);
    std::memset(b.dmin, 0, sizeof b.dmin);
    std::memset(b.scales, 1, sizeof b.scales);
  }
  static void scales(const blocks::Q2_K& b, float* scale, float* minimum) {
    const float all = blocks::half_at(b.d), all_min = blocks::half_at(b.dmin);
    for (int run = 0; run < 16; ++run) {
      scale[run] = all * static_cast<float>(b.scales[run] & 15);
      minimum[run] = all_min * static_cast<float>(b.scales[run] >> 4);
    }
  }
};

template <>
struct Parts<blocks::Q3_K> {
  static constexpr int kRun = 16, kZero = 4, kMost = 7;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 1.0f;
  static void set_unit(blocks::Q3_K& b) {  // every scale 33 - 32
    parts::set_one(b.d);
    std::memset(b.scales, 0x11, 8);
    std::memset(b.scales + 8, 0xaa, 4);
  }
  static void scales(const blocks::Q3_K& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 16; ++run) {
      const int low = b.scales[run % 8] >> run / 8 * 4 & 15, high = b.scales[8 + run % 4] >> run / 4 * 2 & 3;
      scale[run] = all * static_cast<float>((low | high << 4) - 32);
    }
  }
};

template <>
struct Parts<blocks::Q6_K> {
  static constexpr int kRun = 16, kZero = 32, kMost = 63;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 1.0f;
  static void set_unit(blocks::Q6_K& b) {
    parts::set_one(b.d);
    std::memset(b.scales, 1, sizeof b.scales);
  }
  static void scales(const blocks::Q6_K& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 16; ++run) scale[run] = all * static_cast<float>(b.scales[run]);
  }
};

template <>
struct Parts<blocks::IQ4_XS> {
  static constexpr int kRun = 32, kZero = 128, kMost = 255;
  static constexpr bool kWide = true, kHasMin = false;
  static constexpr float kUnit = 1.0f;
  static void set_unit(blocks::IQ4_XS& b) {  // every scale 33 - 32
    parts::set_one(b.d);
    std::memset(b.scales_l, 0x11, sizeof b.scales_l);
    std::memset(b.scales_h, 0xaa, sizeof b.scales_h);
  }
  static void scales(const blocks::IQ4_XS& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    const int high = blocks::load16(b.scales_h);
    for (int run = 0; run < 8; ++run) {
      const int code = (b.scales_l[run / 2] >> run % 2 * 4 & 15) | (high >> 2 * run & 3) << 4;
      scale[run] = all * static_cast<float>(code - 32);
    }
  }
};

template <>
struct Parts<blocks::IQ2_XXS> {
  static constexpr int kRun = 32, kZero = 64, kMost = 127;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 8.0f;
  static void set_unit(blocks::IQ2_XXS& b) {
    parts::set_one(b.d);
    for (auto& run : b.runs) run.signs[3] &= 15;
  }
  static void scales(const blocks::IQ2_XXS& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 8; ++run)
      scale[run] = all * (0.5f + static_cast<float>(b.runs[run].signs[3] >> 4)) * 0.25f;
  }
};

template <>
struct Parts<blocks::IQ3_XXS> {
  static constexpr int kRun = 32, kZero = 64, kMost = 127;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 4.0f;
  static void set_unit(blocks::IQ3_XXS& b) {
    parts::set_one(b.d);
    for (auto& run : b.signs) run[3] &= 15;
  }
  static void scales(const blocks::IQ3_XXS& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 8; ++run)
      scale[run] = all * (0.5f + static_cast<float>(b.signs[run][3] >> 4)) * 0.5f;
  }
};

template <>
struct Parts<blocks::IQ3_S> {
  static constexpr int kRun = 32, kZero = 16, kMost = 31;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 1.0f;
  static void set_unit(blocks::IQ3_S& b) {
    parts::set_one(b.d);
    std::memset(b.scales, 0, sizeof b.scales);
  }
  static void scales(const blocks::IQ3_S& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 8; ++run)
      scale[run] = all * static_cast<float>((b.scales[run / 2] >> run % 2 * 4 & 15) * 2 + 1);
  }
};

// Levels of -1, 0, 1 that are shifted by an eighth: whole numbers of eighths.
template <>
struct Parts<blocks::IQ1_S> {
  static constexpr int kRun = 32, kZero = 16, kMost = 31;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 8.0f;
  static void set_unit(blocks::IQ1_S& b) {
    parts::set_one(b.d);
    for (auto& word : b.qh) word[1] &= 0x8f;
  }
  static void scales(const blocks::IQ1_S& b, float* scale, float*) {
    const float all = blocks::half_at(b.d);
    for (int run = 0; run < 8; ++run)
      scale[run] = all * static_cast<float>((b.qh[run][1] >> 4 & 7) * 2 + 1) * 0.125f;
  }
};

template <>
struct Parts<blocks::IQ1_M> {
  static constexpr int kRun = 16, kZero = 16, kMost = 31;
  static constexpr bool kWide = false, kHasMin = false;
  static constexpr float kUnit = 8.0f;
  static void set_unit(blocks::IQ1_M& b) {  // the float16 1.0, 0x3c00, a nibble on top of each word
    static constexpr uint8_t one[8] = {0, 0x00, 0, 0x00, 0, 0xc0, 0, 0x30};
    std::memcpy(b.scales, one, sizeof one);
  }
  static void scales(const blocks::IQ1_M& b, float* scale, float*) {
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(blocks::load16(b.scales[i]) >> 12) << 4 * i;
    const float all = blocks::half_to_float(static_cast<uint16_t>(d));
    for (int run = 0; run < 16; ++run) {
      const int code = blocks::load16(b.scales[run / 4]) >> run % 4 * 3 & 7;
      scale[run] = all * static_cast<float>(code * 2 + 1) * 0.125f;
    }
  }
};

// use(Type<T>, ggml's number) for every type whose weights are whole numbers times scales.
template <class Use>
constexpr void for_each_quantized(const Use& use) {
  use(Type<blocks::Q4_0>(), 2), use(Type<blocks::Q4_1>(), 3), use(Type<blocks::Q5_0>(), 6);
  use(Type<blocks::Q5_1>(), 7), use(Type<blocks::Q8_0>(), 8), use(Type<blocks::Q8_1>(), 9);
  use(Type<blocks::Q2_K>(), 10), use(Type<blocks::Q3_K>(), 11), use(Type<blocks::Q4_K>(), 12);
  use(Type<blocks::Q5_K>(), 13), use(Type<blocks::Q6_K>(), 14), use(Type<blocks::Q8_K>(), 15);
  use(Type<blocks::IQ2_XXS>(), 16), use(Type<blocks::IQ2_XS>(), 17), use(Type<blocks::IQ3_XXS>(), 18);
  use(Type<blocks::IQ1_S>(), 19), use(Type<blocks::IQ4_NL>(), 20), use(Type<blocks::IQ3_S>(), 21);
  use(Type<blocks::IQ2_S>(), 22), use(Type<blocks::IQ4_XS>(), 23), use(Type<blocks::IQ1_M>(), 29);
  use(Type<blocks::TQ1_0>(), 34), use(Type<blocks::TQ2_0>(), 35), use(Type<blocks::MXFP4>(), 39);
  use(Type<blocks::NVFP4>(), 40), use(Type<blocks::Q1_0>(), 41), use(Type<blocks::Q2_0>(), 42);
  use(Type<blocks::Q6_0>(), 133);
}

// Consecutive blocks to codes, levels + zero; zero is kZero, or 0 for signed codes. A function of its own for
// every type, compiled once in quant_types.cpp.
using TakeApart = void (*)(const uint8_t* block, int zero, uint8_t* codes, float* scales, float* minimums);
template <class T>
TakeApart take_apart();

}  // namespace kvfold
