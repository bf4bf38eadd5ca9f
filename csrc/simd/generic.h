// The vocabulary of quantized products without intrinsics: eight lanes that any compiler turns into what the
// machine has. The definition of every word; avx2.h and avx512.h say the same with other widths.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels/decode_blocks.h"

namespace kvfold {
namespace {

struct Generic {
  static constexpr const char* kName = "generic";
  static constexpr int kLanes = 8;     // 32-bit lanes of a vector; 4 codes each
  static constexpr int kWideZero = 0;  // what is added to levels that need all of int8, for dot<true>
  static constexpr int kTileVectors = 1,
                       kTileCols = 2;  // of a register tile: vectors of weight rows, rows of x
  static constexpr int kCodeVectors = 1, kCodeCols = 2;  // of one of codes
  static constexpr bool kPairSums = false;    // products of codes come as sums of two in int16: avx2.h
  static constexpr bool kNearPanels = false;  // tiles are fast from the first-level cache only

  struct Floats {
    float lane[kLanes];
  };
  struct Ints {
    int32_t lane[kLanes];
  };

  template <class V, class Make>
  static V make(const Make& lane) {
    V v;
    for (int i = 0; i < kLanes; i++) v.lane[i] = lane(i);
    return v;
  }

  static Floats zero() { return set(0.0f); }
  static Floats set(float x) {
    return make<Floats>([=](int) { return x; });
  }
  static Floats load(const float* p) {
    return make<Floats>([=](int i) { return p[i]; });
  }
  static Floats load_first(const float* p, int64_t n) {  // the others 0
    return make<Floats>([=](int i) { return i < n ? p[i] : 0.0f; });
  }
  static void store(float* p, Floats v) { std::memcpy(p, v.lane, sizeof v.lane); }
  static void store_first(float* p, Floats v, int64_t n) { std::memcpy(p, v.lane, n * 4); }
  static Floats add(Floats a, Floats b) {
    return make<Floats>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Floats mul(Floats a, Floats b) {
    return make<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Floats div(Floats a, Floats b) {
    return make<Floats>([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Floats min(Floats a, Floats b) {
    return make<Floats>([&](int i) { return std::min(b.lane[i], a.lane[i]); });
  }
  static Floats max(Floats a, Floats b) {
    return make<Floats>([&](int i) { return std::max(b.lane[i], a.lane[i]); });
  }
  // a * b + c, rounded once or twice.
  static Floats fma(Floats a, Floats b, Floats c) {
    return make<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Floats round(Floats v) {
    return make<Floats>([&](int i) { return std::nearbyintf(v.lane[i]); });
  }
  static Floats power_of_2(Floats n) {  // n whole, within the exponents of normal numbers
    return make<Floats>([&](int i) {
      const int32_t bits = (static_cast<int32_t>(n.lane[i]) + 127) << 23;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    });
  }
  static float sum(Floats v) {
    float total = 0.0f;
    for (float x : v.lane) total += x;
    return total;
  }

  static Ints zero_ints() { return set_ints(0); }
  static Ints set_ints(int32_t x) {
    return make<Ints>([=](int) { return x; });
  }
  static Ints load_codes(const void* p) {
    Ints v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
  }
  static void store_codes(void* p, Ints v) { std::memcpy(p, v.lane, sizeof v.lane); }
  static Ints four_codes(const void* p) {  // the same four in every lane
    int32_t x;
    std::memcpy(&x, p, 4);
    return set_ints(x);
  }
  static Floats to_floats(Ints v) {
    return make<Floats>([&](int i) { return static_cast<float>(v.lane[i]); });
  }

  // Adds to each lane the products of its four codes w with four of x. x is int8; w is unsigned and at most
  // 127, or with `wide` a level plus kWideZero.
  template <bool wide>
  static Ints dot(Ints sum, Ints w, Ints x) {
    return make<Ints>([&](int i) {
      int8_t a[4], b[4];
      std::memcpy(a, &w.lane[i], 4);
      std::memcpy(b, &x.lane[i], 4);
      return sum.lane[i] + a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
    });
  }

  // The scale of each lane of a vector of codes that starts at code `at`, scales[i] for each `run` codes.
  template <int run>
  static Floats scales_of(const float* scales, int at) {
    return make<Floats>([=](int i) { return scales[(at + 4 * i) / run]; });
  }

  // 16 bytes at p and at every stride after it, one a lane, to four vectors: the j-th has bytes 4 j to 4 j +
  // 3 of all.
  static void transpose(const uint8_t* p, int64_t stride, Ints* out) {
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < kLanes; i++) std::memcpy(&out[j].lane[i], p + i * stride + 4 * j, 4);
  }

  // 32 values to codes, their scale and the sums of the codes of either half. activations.py, `quantize`.
  static float quantize(const float* x, int8_t* codes, int32_t* sums) {
    uint32_t bits[32], largest_bits = 0;
    std::memcpy(bits, x, sizeof bits);
    for (uint32_t b : bits) largest_bits = std::max(largest_bits, b & 0x7fffffff);
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    sums[0] = sums[1] = 0;
    if (!(largest_bits < 0x7f800000 && largest >= 0x1p-120f)) {
      std::memset(codes, 0, 32);
      return largest_bits < 0x7f800000 ? 0.0f : __builtin_nanf("");
    }
    const float inverse = 127.0f / largest;
    for (int i = 0; i < 32; i++) {
      codes[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
      sums[i / 16] += codes[i];
    }
    return largest / 127.0f;
  }

  // 16 codes as magnitudes and signs, 0 or -1; returns the sum of the negative ones. For sets whose kWideZero
  // is 0.
  static int32_t take_signs(const int8_t* codes, uint8_t* magnitudes, uint8_t* signs) {
    int32_t negative = 0;
    for (int i = 0; i < 16; i++) {
      signs[i] = codes[i] < 0 ? 0xff : 0;
      magnitudes[i] = static_cast<uint8_t>(std::abs(codes[i]));
      negative += std::min<int>(codes[i], 0);
    }
    return negative;
  }

  // Pairs of bfloat16, two a lane.
  static Ints bf16_pair(const void* p) { return four_codes(p); }
  static Floats dot_bf16(Floats sum, Ints w, Ints x) {
    return make<Floats>([&](int i) {
      const auto high = [](int32_t pair) {
        const uint32_t bits = static_cast<uint32_t>(pair) & 0xffff0000;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
      };
      const auto low = [&](int32_t pair) {
        return high(static_cast<int32_t>(static_cast<uint32_t>(pair) << 16));
      };
      return sum.lane[i] + low(w.lane[i]) * low(x.lane[i]) + high(w.lane[i]) * high(x.lane[i]);
    });
  }
  static void to_bf16(const float* x, uint16_t* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
      out[i] = static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  // Attention over keys and values: kernels/pair_tile.h.
  static constexpr int kPairVectors = 1, kPairRows = 2;  // of a register tile
  // Numbers of at most 32767 times a factor to the nearest whole; what NaN becomes is of no account.
  static void to_shorts(const float* x, float factor, int16_t* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const float scaled = x[i] * factor;
      out[i] = static_cast<int16_t>(std::abs(scaled) < 32767.5f ? std::lrintf(scaled) : 0);
    }
  }
  static Floats magnitude(Floats v) {
    return make<Floats>([&](int i) { return std::fabs(v.lane[i]); });
  }
  static Floats sub(Floats a, Floats b) {
    return make<Floats>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static float largest(Floats v) { return *std::max_element(v.lane, v.lane + kLanes); }
  static Ints bf16_pairs(Floats low, Floats high) {  // a number of each in a lane
    uint16_t a[kLanes], b[kLanes];
    to_bf16(low.lane, a, kLanes);
    to_bf16(high.lane, b, kLanes);
    return make<Ints>([&](int i) { return static_cast<int32_t>(a[i] | static_cast<uint32_t>(b[i]) << 16); });
  }
  static void store_bf16(uint16_t* p, Floats v) { to_bf16(v.lane, p, kLanes); }
  static Floats load_half(const uint8_t* p) {
    return make<Floats>([=](int i) { return blocks::half_at(p + 2 * i); });
  }
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache
  static constexpr int64_t kAhead = 8192;  // bytes from what a row dot multiplies to what it asks for

  // Attention over latents: kernels/latent_tile.h.
  static constexpr int kLatentKeys = 2, kLatentCodeKeys = 2,
                       kLatentColumns = 2;  // of register tiles with a vector of heads each
  static Ints interleave(const uint16_t* low, const uint16_t* high) {  // a number of each in a lane
    return make<Ints>(
        [=](int i) { return static_cast<int32_t>(low[i] | static_cast<uint32_t>(high[i]) << 16); });
  }
  // Whole numbers of 16 bits, two a lane.
  template <class Make>
  static Ints shorts(const Make& half) {  // half(lane, 0 or 1)
    return make<Ints>([&](int i) {
      return static_cast<int32_t>((half(i, 0) & 0xffffu) | static_cast<uint32_t>(half(i, 1)) << 16);
    });
  }
  static int32_t short_of(Ints v, int lane, int half) {
    return static_cast<int16_t>(static_cast<uint32_t>(v.lane[lane]) >> 16 * half);
  }
  // Numbers of at most 32767.4 to the nearest whole; what NaN becomes is of no account.
  static Ints whole_pairs(Floats low, Floats high) {
    return shorts([&](int i, int h) {
      const float x = h == 0 ? low.lane[i] : high.lane[i];
      return static_cast<uint32_t>(std::fabs(x) < 32767.5f ? std::lrintf(x) : 0);
    });
  }
  // Products of numbers in 0 .. 32767 in units of 2^15, a half rounded up.
  static Ints multiply_shares(Ints a, Ints b) {
    return shorts([&](int i, int h) {
      return static_cast<uint32_t>((short_of(a, i, h) * short_of(b, i, h) + 0x4000) >> 15);
    });
  }
  static Ints dot_shorts(Ints sum, Ints a, Ints b) {
    return make<Ints>([&](int i) {
      return sum.lane[i] + short_of(a, i, 0) * short_of(b, i, 0) + short_of(a, i, 1) * short_of(b, i, 1);
    });
  }
  // 16 bytes of each to words; where the words of four columns from column on begin.
  static constexpr int pair_place(int column) { return column; }
  static void pair_bytes(const int8_t* low, const int8_t* high, uint32_t* to) {
    for (int i = 0; i < 16; i++) {
      to[i] = (static_cast<uint32_t>(low[i]) & 0xffffu) | static_cast<uint32_t>(high[i]) << 16;
    }
  }
  static void q8_scales(const uint8_t* row, int64_t num_blocks, float* scales) {
    for (int64_t b = 0; b < num_blocks; b++) scales[b] = blocks::half_at(row + 34 * b);
  }
};

}  // namespace
}  // namespace kvfold
