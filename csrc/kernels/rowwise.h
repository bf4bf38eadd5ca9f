// Ops that look at one row at a time.

#pragma once

#include "kernels/step_view.h"
#include "kernels/weights.h"

namespace kvfold {

// Rows of the embedding table for the step's token ids.
void embed(const Machine& machine, const Step& step, const Weight& table, Matrix out);

// x / sqrt(mean(x^2) + eps) * weight. Panel: one row of the weight in the shared space.
void norm(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, float eps, Matrix out);

// Rotates the last 2 * num_pairs numbers of every head of `head_dim`, in place.
void rope(const Machine& machine, const Step& step, Matrix x, int64_t head_dim, bool half_split);

// silu(gate) * up
void swiglu(const Machine& machine, int64_t rows, Matrix gate, Matrix up, Matrix out);

void add(const Machine& machine, int64_t rows, Matrix x, Matrix y, Matrix out);

void take_outputs(const Machine& machine, const Step& step, Matrix x, Matrix out);

// x * sigmoid(x)
float silu(float x);

}  // namespace kvfold
