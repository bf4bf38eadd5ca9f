// x @ W^T with W in the blocks of its file.

#pragma once

#include "kernels/step_view.h"
#include "kernels/weights.h"

namespace kvfold {

// x [rows, in], weight [out, in] -> out [rows, out]. Scratch: linear_floats. Shared: at least
// linear_shared_floats.
void linear(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, Matrix out);
int64_t linear_floats(const Weight& weight);
int64_t linear_shared_floats(const Weight& weight);

}  // namespace kvfold
