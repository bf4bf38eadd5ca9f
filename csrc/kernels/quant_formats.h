// How a type is cut into runs on one instruction set: what the row dot and the tile are compiled for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/quant_types.h"

namespace kvfold {
namespace {

constexpr int64_t kBlock = 32;  // activations that share a scale

// Types of one shape share their loops, and thereby their code: five shapes stand for 28 types.
template <int run, bool has_zero, bool has_min, bool wide>
struct Shape {
  static constexpr int kRun = run, kRuns = 32 / run;  // runs of a block of activations
  static constexpr bool kHasZero = has_zero, kHasMin = has_min, kWide = wide;
};

// A type on an instruction set S. Levels that need all of int8 get S::kWideZero added; where that makes them
// unsigned they are like any others.
template <class S, class T>
struct Format {
  static constexpr int kZero =
      Parts<T>::kWide ? S::kWideZero : Parts<T>::kZero;  // what codes have on top of levels
  using Like = Shape<Parts<T>::kRun, kZero != 0, Parts<T>::kHasMin, Parts<T>::kWide && S::kWideZero == 0>;
  // Sums of two products of a run that add up in int16, where the set has them: of 8, of 4, of 2 or of none.
  // Sums that begin at minus the zero point times the codes of x hold levels at the end, whatever codes add
  // up to before; two of these are as many instructions as one after the other.
  static constexpr int kLargest = Like::kHasZero ? std::max(kZero, Parts<T>::kMost - kZero) : Parts<T>::kMost;
  static constexpr int kFit = 8 * 2 * 127 * kLargest <= 32767                      ? 8
                              : 4 * 2 * 127 * kLargest <= 32767                    ? 4
                              : !Like::kHasZero && 2 * 2 * 127 * kLargest <= 32767 ? 2
                                                                                   : 1;
  static constexpr int kPairs = !S::kPairSums || Like::kWide ? 1 : std::min(kFit, 8 / Like::kRuns);
  static_assert(kPairs == 1 || 2 * 127 * Parts<T>::kMost <= 32767);
};

// Vector code of an instruction set S for a type T; a specialization in simd/*_dots.h replaces what it is
// faster at.
//   kDot     has  template <int rows> static void dot(const uint8_t* row, int64_t k, const DotRow* x,
//            float* y, int64_t ahead)
//            for x whose 16-code pieces were moved to place(piece), piece counted within 128 codes; asks for
//            the bytes of the row that are so far ahead of it
//   kUnpack  has  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel)
//            for whole panels
//   kQuads   has  static Floats quads(const uint8_t* raw, int64_t row_bytes, Ints (&out)[8])
//            for blocks of 32 weights, kBytes each, one of as many rows as a vector has lanes: four codes a
//            lane and vector, in order, and their scales
//   kTakeApart  has  take_apart, as quant_types.h
struct NoFast {
  static constexpr bool kDot = false, kUnpack = false, kQuads = false, kTakeApart = false;
  static constexpr int place(int piece) { return piece; }
};
template <class S, class T>
struct Fast : NoFast {};

// Vector code from a row to float32 and for folding rows, in simd/*_decode.h; null where a set has none.
struct F16Numbers;
struct Bf16Numbers;
struct NoFold {  // kernels/latent_kernels.h, FoldColumns
  static constexpr void (*rows)(const uint8_t* rows, int64_t row_bytes, int64_t k, const float* x, float* out,
                                const uint8_t* next) = nullptr;
};
template <class S, class T>
struct FastFold : NoFold {};
struct NoDecode {
  static constexpr void (*row)(const uint8_t* row, int64_t k, float* out) = nullptr;
};
template <class S, class T>
struct FastDecode : NoDecode {};

template <class S, class T>
inline TakeApart best_take_apart() {
  if constexpr (Fast<S, T>::kTakeApart) {
    return Fast<S, T>::take_apart;
  } else {
    return take_apart<T>();
  }
}

// A row of x as dot reads it. Magnitudes and signs are there for weights that need all of int8.
struct DotRow {
  const int8_t* codes;        // [K]
  const uint8_t* magnitudes;  // [K]
  const int8_t* signs;        // [K]: -1 of negative codes, 0 of others
  const float* scales;        // [K / run]
  const float* sums;  // [K / run]: scale times the sum of the run's codes, or times that of its negative ones
};

}  // namespace
}  // namespace kvfold
