#include "kernels/side_by_side.h"

namespace kvfold {
namespace {

template <class T>
void put_groups(const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to) {
  auto* mixed = reinterpret_cast<SideBySide<T>*>(to);
  for (int64_t done = 0; done < rows; done += kRowsSideBySide, from += kRowsSideBySide * row_bytes) {
    for (int64_t at = 0; at < row_bytes; at += sizeof(T), mixed++) {
      for (int64_t k = 0; k < kRowsSideBySide; k++) mixed->put_row(k, from + k * row_bytes + at);
    }
  }
}

}  // namespace

void put_side_by_side(int32_t type_id, const uint8_t* from, int64_t rows, int64_t row_bytes, uint8_t* to) {
  for_each_side_by_side([&](auto type, int32_t id) {
    if (id == type_id) put_groups<typename decltype(type)::type>(from, rows, row_bytes, to);
  });
}

}  // namespace kvfold
