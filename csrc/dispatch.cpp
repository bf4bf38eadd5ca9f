#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace kvfold {

const InstructionSet& generic_set();
#ifdef KVFOLD_X86_SETS
const InstructionSet& avx2_set();
const InstructionSet& avx512_set();
#endif

namespace {
std::atomic<const InstructionSet*> forced{nullptr};
}  // namespace

const std::vector<const InstructionSet*>& instruction_sets() {
  static const std::vector<const InstructionSet*> sets = [] {
    std::vector<const InstructionSet*> found;
#ifdef KVFOLD_X86_SETS
    const auto has_all = [](auto... has) { return (has && ...); };
    if (has_all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512dq"),
                __builtin_cpu_supports("avx512vbmi"), __builtin_cpu_supports("avx512vnni"),
                __builtin_cpu_supports("avx512bf16"))) {
      found.push_back(&avx512_set());
    }
    if (has_all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"),
                __builtin_cpu_supports("f16c"))) {
      found.push_back(&avx2_set());
    }
#endif
    found.push_back(&generic_set());
    return found;
  }();
  return sets;
}

const InstructionSet& isa() {
  const InstructionSet* set = forced.load(std::memory_order_relaxed);
  return set != nullptr ? *set : *instruction_sets().front();
}

bool force_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    forced.store(nullptr);
    return true;
  }
  for (const InstructionSet* set : instruction_sets()) {
    if (std::strcmp(set->name, name) == 0) {
      forced.store(set);
      return true;
    }
  }
  return false;
}

const MatrixKernels* InstructionSet::find(int type) const {
  for (int32_t i = 0; i < num_kernels; i++) {
    if (kernels[i].type == type) return &kernels[i];
  }
  for (int32_t i = 0; i < num_side_by_side; i++) {
    if (side_by_side[i].type == type) return &side_by_side[i];
  }
  return nullptr;
}

}  // namespace kvfold
