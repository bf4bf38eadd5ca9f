// Row dots of types as on AVX-512, and their panels for matrix tiles.
#pragma once

#include "simd/amx.h"
#include "simd/avx512_dots.h"

namespace kvfold {
namespace {

// Rows are read as on AVX-512; panels hold signed levels.
template <class T>
struct Fast<Amx, T> : Fast<Avx512, T> {
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    Fast<Avx512, T>::template unpack<true>(raw, row_bytes, k, panel);
  }
};

}  // namespace
}  // namespace kvfold
