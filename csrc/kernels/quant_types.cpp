#include "kernels/quant_types.h"

namespace kvfold {
namespace {

template <class T>
void take_apart_block(const uint8_t* block, int zero, uint8_t* codes, float* scales, float* minimums) {
  T b;
  std::memcpy(&b, block, sizeof b);
  Parts<T>::scales(b, scales, minimums);
  Parts<T>::set_unit(b);
  float levels[T::elements];
  b.decode(levels);
  const float add = static_cast<float>(zero);
  for (int i = 0; i < T::elements; ++i)
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(levels[i] * Parts<T>::kUnit + add));
}

}  // namespace

template <class T>
TakeApart take_apart() {
  return take_apart_block<T>;
}

template TakeApart take_apart<blocks::Q4_0>();
template TakeApart take_apart<blocks::Q4_1>();
template TakeApart take_apart<blocks::Q5_0>();
template TakeApart take_apart<blocks::Q5_1>();
template TakeApart take_apart<blocks::Q8_0>();
template TakeApart take_apart<blocks::Q8_1>();
template TakeApart take_apart<blocks::Q2_K>();
template TakeApart take_apart<blocks::Q3_K>();
template TakeApart take_apart<blocks::Q4_K>();
template TakeApart take_apart<blocks::Q5_K>();
template TakeApart take_apart<blocks::Q6_K>();
template TakeApart take_apart<blocks::Q8_K>();
template TakeApart take_apart<blocks::IQ2_XXS>();
template TakeApart take_apart<blocks::IQ2_XS>();
template TakeApart take_apart<blocks::IQ3_XXS>();
template TakeApart take_apart<blocks::IQ1_S>();
template TakeApart take_apart<blocks::IQ4_NL>();
template TakeApart take_apart<blocks::IQ3_S>();
template TakeApart take_apart<blocks::IQ2_S>();
template TakeApart take_apart<blocks::IQ4_XS>();
template TakeApart take_apart<blocks::IQ1_M>();
template TakeApart take_apart<blocks::TQ1_0>();
template TakeApart take_apart<blocks::TQ2_0>();
template TakeApart take_apart<blocks::MXFP4>();
template TakeApart take_apart<blocks::NVFP4>();
template TakeApart take_apart<blocks::Q1_0>();
template TakeApart take_apart<blocks::Q2_0>();
template TakeApart take_apart<blocks::Q6_0>();

}  // namespace kvfold
