// 2^x in the vocabulary of an instruction set.
#pragma once

#include <cstdint>

namespace kvfold {
namespace {

// To 1 unit in the last place for -126 <= x <= 127; 0 below -126.5. NaN stays NaN.
//
// 2^n times a polynomial in the rest, |rest| <= 1/2, whose relative error is at most 2^-28.9 (fitted for the
// smallest largest error, constant term exactly one): what remains is the rounding of its last step.
template <class S>
inline typename S::Floats exp2(typename S::Floats x) {
  x = S::max(x, S::set(-127.0f));  // 2^-127 is no normal number: power_of_2 and what follows make it zero
  const auto n = S::round(x);
  const auto rest = S::sub(x, n);
  auto p = S::set(0x1.41fbbcp-13f);
  p = S::fma(p, rest, S::set(0x1.5f3e54p-10f));
  p = S::fma(p, rest, S::set(0x1.3b2d4cp-7f));
  p = S::fma(p, rest, S::set(0x1.c6aee8p-5f));
  p = S::fma(p, rest, S::set(0x1.ebfbdcp-3f));
  p = S::fma(p, rest, S::set(0x1.62e43p-1f));
  p = S::fma(p, rest, S::set(1.0f));
  return S::mul(p, S::power_of_2(n));
}

}  // namespace
}  // namespace kvfold
