// Row dots of generation: every weight row is read once, in file order, for one to four rows of activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "kernels/quant_formats.h"

namespace kvfold {
namespace {

// Prepared rows are padded with zeros to whole chunks, so that a last vector may be read whole.
constexpr int64_t kDotChunk = 512;
inline int64_t padded(int64_t k) { return (k + kDotChunk - 1) / kDotChunk * kDotChunk; }

// Activations of a shape, and rows through take_apart().
template <class S, class Like>
struct AnyDot {
  // Bytes for each code: where weights need all of int8 its magnitude and its sign follow.
  static constexpr int kCodes = Like::kWide ? 3 : 1;
  // Scales, and sums behind them, end in zeros too: a last vector of them may begin in any run.
  static int64_t runs(int64_t k) { return padded(k) / Like::kRun + 16; }
  static int64_t bytes(int64_t k) { return kCodes * padded(k) + 2 * runs(k) * 4; }

  static DotRow view(const uint8_t* prepared, int64_t k) {
    const auto* codes = reinterpret_cast<const int8_t*>(prepared);
    const auto* scales = reinterpret_cast<const float*>(prepared + kCodes * padded(k));
    return {codes, prepared + padded(k), codes + 2 * padded(k), scales, scales + runs(k)};
  }

  static void prepare(const float* x, int64_t k, int (*place)(int), uint8_t* prepared) {
    auto* scales = reinterpret_cast<float*>(prepared + kCodes * padded(k));
    float* sums = scales + runs(k);
    std::memset(prepared, 0, bytes(k));
    for (int64_t at = 0; at < k; at += kBlock) {
      alignas(64) int8_t codes[kBlock];
      int32_t halves[2];
      const float scale = S::quantize(x + at, codes, halves);
      for (int piece = 0; piece < 2; piece++) {
        const int64_t from = at / 16 + piece;
        uint8_t* to = prepared + 16 * (from / 8 * 8 + place(from % 8));
        std::memcpy(to, codes + 16 * piece, 16);
        if constexpr (Like::kWide) {
          halves[piece] = S::take_signs(codes + 16 * piece, to + padded(k), to + 2 * padded(k));
        }
      }
      for (int run = 0; run < Like::kRuns; run++) {
        const int32_t sum = Like::kRuns == 2 ? halves[run] : halves[0] + halves[1];
        scales[at / Like::kRun + run] = scale;
        sums[at / Like::kRun + run] = scale * static_cast<float>(sum);
      }
    }
  }

  // A block type as bytes.
  struct Blocks {
    TakeApart take_apart;
    int elements, bytes, zero;
  };

  template <int rows>
  static void row(const Blocks& type, const uint8_t* w, int64_t k, const DotRow* x, float* y) {
    constexpr int kVector = 4 * S::kLanes;  // codes of a vector
    constexpr int kChunk = 256;             // weights taken apart at a time: the largest block
    typename S::Floats sum[rows];
    float minus[rows] = {};
    for (auto& s : sum) s = S::zero();
    for (int64_t at = 0; at < k; at += kChunk) {
      alignas(64) uint8_t codes[kChunk];
      alignas(64) float scales[kChunk / Like::kRun + 16] = {}, minimums[kChunk / Like::kRun + 16] = {};
      const int count = static_cast<int>(std::min<int64_t>(kChunk, k - at));
      for (int i = 0; i < count; i += type.elements, w += type.bytes) {
        type.take_apart(w, type.zero, codes + i, scales + i / Like::kRun, minimums + i / Like::kRun);
      }
      std::memset(codes + count, 0, kChunk - count);
      for (int r = 0; r < rows; r++) {
        const float* x_scales = x[r].scales + at / Like::kRun;
        const float* x_sums = x[r].sums + at / Like::kRun;
        for (int i = 0; i < count; i += kVector) {
          const auto products = S::template dot<Like::kWide>(S::zero_ints(), S::load_codes(codes + i),
                                                             S::load_codes(x[r].codes + at + i));
          const auto scale = S::mul(S::template scales_of<Like::kRun>(scales, i),
                                    S::template scales_of<Like::kRun>(x_scales, i));
          sum[r] = S::fma(S::to_floats(products), scale, sum[r]);
        }
        for (int i = 0; i < count / Like::kRun; i++) {
          if (Like::kHasMin) minus[r] += minimums[i] * x_sums[i];
          if (Like::kHasZero) minus[r] += static_cast<float>(type.zero) * scales[i] * x_sums[i];
        }
      }
    }
    for (int r = 0; r < rows; r++) y[r] = S::sum(sum[r]) - minus[r];
  }
};

// use(integral_constant) of the smaller of count and max.
template <int max, class Use>
inline void with_count(int64_t count, const Use& use) {
  if (count >= max) {
    use(std::integral_constant<int, max>{});
  } else if constexpr (max > 1) {
    with_count<max - 1>(count, use);
  }
}

// Bytes from a row to what is read ahead while it is multiplied: `far`, and over the end of the last rows to
// those after them.
class ReadAhead {
 public:
  ReadAhead(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t far, const RowsAfter& after)
      : last_(std::max<int64_t>(0, n - (far + row_bytes - 1) / row_bytes)),
        last_row_(raw + last_ * row_bytes),
        bytes_(far),
        after_(after) {}

  // Of each row in turn.
  int64_t of(int64_t row) {
    if (row == last_) {
      if (const uint8_t* next = after_()) bytes_ = next - last_row_;
    }
    return bytes_;
  }

 private:
  const int64_t last_;
  const uint8_t* const last_row_;
  int64_t bytes_;
  const RowsAfter& after_;
};

template <class S, class T>
struct QuantDot {
  using Any = AnyDot<S, typename Format<S, T>::Like>;

  static void prepare(const float* x, int64_t k, uint8_t* prepared) {
    Any::prepare(x, k, Fast<S, T>::place, prepared);
  }

  static void dot(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, const uint8_t* prepared,
                  int64_t count, float* y, int64_t ldy, const RowsAfter& after) {
    with_count<MatrixKernels::kMaxDotRows>(count, [&](auto constant) {
      constexpr int rows = decltype(constant)::value;
      DotRow x[rows];
      for (int r = 0; r < rows; r++) x[r] = Any::view(prepared + r * Any::bytes(k), k);
      [[maybe_unused]] ReadAhead ahead(raw, row_bytes, n, S::kAhead, after);
      for (int64_t i = 0; i < n; i++) {
        float dots[rows];
        if constexpr (Fast<S, T>::kDot) {
          Fast<S, T>::template dot<rows>(raw + i * row_bytes, k, x, dots, ahead.of(i));
        } else {
          const typename Any::Blocks type{best_take_apart<S, T>(), T::elements, sizeof(T),
                                          Format<S, T>::kZero};
          Any::template row<rows>(type, raw + i * row_bytes, k, x, dots);
        }
        for (int r = 0; r < rows; r++) y[r * ldy + i] = dots[r];
      }
    });
  }
};

}  // namespace
}  // namespace kvfold
