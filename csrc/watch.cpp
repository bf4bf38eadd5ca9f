#include "watch.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvfold {
namespace {

int64_t count_nan(const float* row, int64_t width) {
  return std::count_if(row, row + width, [](float x) { return std::isnan(x); });
}
int64_t count_infinite(const float* row, int64_t width) {
  return std::count_if(row, row + width, [](float x) { return std::isinf(x); });
}

}  // namespace

void check_finite(const std::string& op, Matrix value, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const float* row = value.row(i);
    if (std::all_of(row, row + value.width, [](float x) { return std::isfinite(x); })) continue;
    const int64_t nan = count_nan(row, value.width);
    const int64_t wrong = nan > 0 ? nan : count_infinite(row, value.width);
    throw NotFinite(op + ": " + std::to_string(wrong) + " of " + std::to_string(value.width) +
                    " values are " + (nan > 0 ? "NaN" : "infinite") + " in row " + std::to_string(i) +
                    ", and the ops before it made finite ones only.");
  }
}

int64_t count_experts(const Experts& experts, Matrix ids, int64_t rows) {
  std::vector<bool> is_chosen(experts.count);
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t k = 0; k < ids.width; k++) is_chosen[ids.ids(i)[k]] = true;
  }
  int64_t used = 0;
  for (int64_t e = 0; e < experts.count; e++) used += is_chosen[e] && experts.takes_part(e);
  return used;
}

}  // namespace kvfold
