// The constants and weights of an op in the types of its kernel. The order is that of model/program.py.

#pragma once

#include "kernels/mla_up.h"
#include "kernels/moe.h"
#include "recording.h"

namespace kvfold {

inline MlaDims mla_dims(const Op& op) { return {op.ints[0], op.ints[1], op.ints[2], op.ints[3], op.ints[4]}; }

inline const Weight* weight_or_null(const Op& op, size_t i, const std::vector<Weight>& weights) {
  return op.weights[i] >= 0 ? &weights[op.weights[i]] : nullptr;
}

inline KvUp up_weights(const Op& op, const std::vector<Weight>& weights) {
  return {weight_or_null(op, 0, weights), weight_or_null(op, 1, weights), weight_or_null(op, 2, weights)};
}

// model/program.py: EVERY_EXPERT. Otherwise the ints of the op are the ids of those that take part.
inline bool takes_every_expert(const Op& op) { return op.ints.size() == 1 && op.ints[0] == -1; }

inline Routing routing(const Op& op) {
  return {op.ints[0],      op.ints[1],      op.ints[2],      op.ints[3],
          op.ints[4] != 0, op.ints[5] != 0, op.ints[6] != 0, static_cast<float>(op.floats[0])};
}

inline Experts experts_of(const Op& op, const std::vector<Weight>& weights) {
  // down gives every expert `hidden` rows.
  const int64_t count = weights[op.weights[2]].rows() / op.inputs[0].width;
  const auto gated = [&](size_t first) -> Gated {
    return {weights[op.weights[first]], weights[op.weights[first + 1]], weights[op.weights[first + 2]]};
  };
  const bool has_shared = op.weights[3] >= 0;
  return {gated(0), count, takes_every_expert(op) ? nullptr : &op.ints,
          has_shared ? std::optional(gated(3)) : std::nullopt};
}

}  // namespace kvfold
