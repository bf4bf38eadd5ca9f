#include "simd/generic.h"

#include "kernels/quant_set.h"

namespace kvfold {
const InstructionSet& generic_set() { return make_set<Generic>(); }
}  // namespace kvfold
