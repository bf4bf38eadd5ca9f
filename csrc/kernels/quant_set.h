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
  static_assert(MatrixKernels::kFewRows % Any::kCols == 0);
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
  static_assert(MatrixKernels::kFewRows % M::kCols == 0);
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

// No std::vector: its functions would be compiled for one set and shared by all.
struct KernelTable {
  MatrixKernels kernels[31] = {};
  int32_t count = 0;

  constexpr void add(const MatrixKernels& of_type) { kernels[count++] = of_type; }
};

template <class S>
const InstructionSet& make_set(const Tiles& tiles, const PairKernels& pairs, const LatentKernels& latent,
                               const KernelTable* side_by_side = nullptr) {
  static constexpr KernelTable table = [] {
    KernelTable all;
    all.add(numbers<S, F32Weights>()), all.add(numbers<S, F16Weights>()), all.add(numbers<S, Bf16Weights>());
    for_each_quantized(
        [&](auto type, int32_t id) { all.add(quantized<S, typename decltype(type)::type>(id)); });
    return all;
  }();
  static const InstructionSet set = {S::kName,
                                     &tiles,
                                     table.kernels,
                                     table.count,
                                     side_by_side == nullptr ? nullptr : side_by_side->kernels,
                                     side_by_side == nullptr ? 0 : side_by_side->count,
                                     Rowwise<S>::swiglu,
                                     Rowwise<S>::add_scaled,
                                     &pairs,
                                     &latent};
  return set;
}

}  // namespace
}  // namespace kvfold
