// x @ W^T with W in the blocks of its file.

#pragma once

#include "kernels/step_view.h"
#include "kernels/weights.h"

namespace kvfold {

// x [rows, in], weight [out, in] -> out [rows, out]. Scratch: one panel.
void linear(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, Matrix out);

}  // namespace kvfold
