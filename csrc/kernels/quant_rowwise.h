// What stands between two products.
#pragma once

#include <cstdint>

#include "kernels/quant_tile.h"

namespace kvfold {
namespace {

// e^x to 2 units in the last place: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2. 0 below e^-87.
template <class S>
inline typename S::Floats exponential(typename S::Floats x) {
  x = S::max(S::min(x, S::set(88.0f)), S::set(-87.0f));
  const auto n = S::round(S::mul(x, S::set(1.44269504f)));
  auto rest = S::fma(n, S::set(-0.693359375f), x);  // ln 2 in two parts, the first exact times n
  rest = S::fma(n, S::set(2.12194440e-4f), rest);
  auto p = S::set(1.9875691500e-4f);  // Cephes' expf
  p = S::fma(p, rest, S::set(1.3981999507e-3f));
  p = S::fma(p, rest, S::set(8.3334519073e-3f));
  p = S::fma(p, rest, S::set(4.1665795894e-2f));
  p = S::fma(p, rest, S::set(1.6666665459e-1f));
  p = S::fma(p, rest, S::set(5.0000001201e-1f));
  p = S::add(S::fma(S::mul(p, rest), rest, rest), S::set(1.0f));
  return S::mul(p, S::power_of_2(n));
}

template <class S>
struct Rowwise {
  // out = step(a, b) for all n, the last vector through copies.
  template <class Step>
  static void for_vectors(const float* a, const float* b, float* out, int64_t n, const Step& step) {
    int64_t i = 0;
    for (; i + S::kLanes <= n; i += S::kLanes) S::store(out + i, step(S::load(a + i), S::load(b + i)));
    if (i == n) return;
    float last_a[S::kLanes] = {}, last_b[S::kLanes] = {};
    std::memcpy(last_a, a + i, (n - i) * 4);
    std::memcpy(last_b, b + i, (n - i) * 4);
    S::store_first(out + i, step(S::load(last_a), S::load(last_b)), n - i);
  }

  static void swiglu(const float* gate, const float* up, float* out, int64_t n) {
    const auto one = S::set(1.0f), minus = S::set(-1.0f);
    for_vectors(gate, up, out, n, [&](auto g, auto u) {
      return S::mul(S::div(g, S::add(one, exponential<S>(S::mul(g, minus)))), u);
    });
  }

  static void add_scaled(const float* x, float factor, float* y, int64_t n) {
    const auto f = S::set(factor);
    for_vectors(x, y, y, n, [&](auto a, auto b) { return S::fma(a, f, b); });
  }
};

}  // namespace
}  // namespace kvfold
