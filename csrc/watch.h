// What a run looks at beside computing: whether what an op made is finite, and how long it took. Off, none of
// it runs.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/moe.h"

namespace kvfold {

// An op made NaN or infinity; names the op, how many and where.
struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws NotFinite for rows [first, last) of a value; of several wrong rows it tells about the first.
void check_finite(const std::string& op, Matrix value, int64_t first, int64_t last);

// One op of a run, barriers included. Of experts also how many of them had rows: what was read depends on it.
struct OpTime {
  int64_t ns = 0;
  int64_t experts = 0;
};

// Experts that take part and are among the ids of rows [0, rows).
int64_t count_experts(const Experts& experts, Matrix ids, int64_t rows);

}  // namespace kvfold
