// All kernels of one instruction set, in a table. Included last by isa/*.cpp.
#pragma once

#include "dispatch.h"
#include "kernels/quant_dot.h"
#include "kernels/quant_float.h"
#include "kernels/quant_rowwise.h"
#include "kernels/quant_tile.h"
#include "kernels/tile.h"

namespace kvfold {
namespace {

template <class S, class T>
constexpr MatrixKernels quantized(int32_t id) {
  using Dot = QuantDot<S, T>;
  using Tile = QuantTile<S, T>;
  using Any = typename Tile::Any;
  return {id,
          Rounding::kInt8,
          1,
          Dot::Any::bytes,
          Dot::prepare,
          Dot::dot,
          Any::kRows,
          Any::kCols,
          S::kNearPanels,
          Any::group_bytes,
          Tile::prepare,
          Any::kPanelColumns,
          Any::panel_bytes,
          Tile::unpack,
          Any::tile};
}

template <class S, class T>
constexpr MatrixKernels numbers() {
  using M = FloatMatrix<S, T>;
  return {T::kId,
          T::kPairs ? Rounding::kBf16 : Rounding::kNone,
          1,
          M::dot_bytes,
          M::prepare_dot,
          M::dot,
          M::kRows,
          M::kCols,
          S::kNearPanels,
          M::group_bytes,
          M::prepare_tile,
          M::kPanelColumns,
          M::panel_bytes,
          M::unpack,
          M::tile};
}

template <class S>
const InstructionSet& make_set(const Tiles& tiles, const PairKernels& pairs, const LatentKernels& latent,
                               const MatrixKernels* side_by_side = nullptr, int32_t num_side_by_side = 0) {
  static constexpr MatrixKernels kernels[] = {
      numbers<S, F32Weights>(),          numbers<S, F16Weights>(),         numbers<S, Bf16Weights>(),
      quantized<S, blocks::Q4_0>(2),     quantized<S, blocks::Q4_1>(3),    quantized<S, blocks::Q5_0>(6),
      quantized<S, blocks::Q5_1>(7),     quantized<S, blocks::Q8_0>(8),    quantized<S, blocks::Q8_1>(9),
      quantized<S, blocks::Q2_K>(10),    quantized<S, blocks::Q3_K>(11),   quantized<S, blocks::Q4_K>(12),
      quantized<S, blocks::Q5_K>(13),    quantized<S, blocks::Q6_K>(14),   quantized<S, blocks::Q8_K>(15),
      quantized<S, blocks::IQ2_XXS>(16), quantized<S, blocks::IQ2_XS>(17), quantized<S, blocks::IQ3_XXS>(18),
      quantized<S, blocks::IQ1_S>(19),   quantized<S, blocks::IQ4_NL>(20), quantized<S, blocks::IQ3_S>(21),
      quantized<S, blocks::IQ2_S>(22),   quantized<S, blocks::IQ4_XS>(23), quantized<S, blocks::IQ1_M>(29),
      quantized<S, blocks::TQ1_0>(34),   quantized<S, blocks::TQ2_0>(35),  quantized<S, blocks::MXFP4>(39),
      quantized<S, blocks::NVFP4>(40),   quantized<S, blocks::Q1_0>(41),   quantized<S, blocks::Q2_0>(42),
      quantized<S, blocks::Q6_0>(133),
  };
  static const InstructionSet set = {S::kName,
                                     &tiles,
                                     kernels,
                                     sizeof kernels / sizeof kernels[0],
                                     side_by_side,
                                     num_side_by_side,
                                     Rowwise<S>::swiglu,
                                     Rowwise<S>::add_scaled,
                                     &pairs,
                                     &latent};
  return set;
}

}  // namespace
}  // namespace kvfold
