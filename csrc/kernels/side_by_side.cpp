#include "kernels/side_by_side.h"

#include <vector>

namespace kvfold {
namespace {

template <class T>
void put_groups(uint8_t* raw, int64_t rows, int64_t row_bytes) {
  std::vector<uint8_t> group(kRowsSideBySide * row_bytes);
  for (int64_t done = 0; done < rows; done += kRowsSideBySide, raw += kRowsSideBySide * row_bytes) {
    std::memcpy(group.data(), raw, group.size());
    auto* mixed = reinterpret_cast<SideBySide<T>*>(raw);
    for (int64_t at = 0; at < row_bytes; at += sizeof(T), mixed++) {
      for (int64_t k = 0; k < kRowsSideBySide; k++) mixed->put_row(k, group.data() + k * row_bytes + at);
    }
  }
}

}  // namespace

void put_side_by_side(int32_t type_id, uint8_t* raw, int64_t rows, int64_t row_bytes) {
  switch (type_id) {
    case 2:
      return put_groups<blocks::Q4_0>(raw, rows, row_bytes);
    case 6:
      return put_groups<blocks::Q5_0>(raw, rows, row_bytes);
    case 8:
      return put_groups<blocks::Q8_0>(raw, rows, row_bytes);
    case 20:
      return put_groups<blocks::IQ4_NL>(raw, rows, row_bytes);
  }
}

}  // namespace kvfold
