// The shapes of AMX's eight tiles as `ldtilecfg` reads them. No intrinsics, for those who only ask for the
// peak of tiles: kernels/ceilings.cpp.
#pragma once

#include <cstdint>

namespace kvfold {

// All of 16 rows of 64 bytes unless changed.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace kvfold
