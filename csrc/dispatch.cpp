#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvfold {

const InstructionSet& generic_set();
#ifdef KVFOLD_X86_SETS
const InstructionSet& avx2_set();
const InstructionSet& avx512_set();
#endif
#ifdef KVFOLD_AMX_SET
const InstructionSet& amx_set();
#endif

namespace {

#ifdef KVFOLD_AMX_SET
// Linux gives a process tiles when it asks for them, once and for all of its threads: what a thread saves
// grows by 8 KiB. Refused where a thread's stack for signals is too small for that.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kArchRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, from Linux 5.16 on
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

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
#ifdef KVFOLD_AMX_SET
      if (may_use_tiles()) found.push_back(&amx_set());
#endif
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

const InstructionSet* find_set(const char* name) {
  if (std::strcmp(name, "auto") == 0) return &isa();
  for (const InstructionSet* set : instruction_sets()) {
    if (std::strcmp(set->name, name) == 0) return set;
  }
  return nullptr;
}

bool force_isa(const char* name) {
  const bool undoes = std::strcmp(name, "auto") == 0;
  const InstructionSet* set = undoes ? nullptr : find_set(name);
  if (!undoes && set == nullptr) return false;
  forced.store(set);
  return true;
}

KernelNames names_of(const MatrixKernels& kernels) {
  KernelNames names{"", ""};
  // From the least set to the fastest one, which may have functions of one before it.
  for (auto set = instruction_sets().rbegin(); set != instruction_sets().rend(); ++set) {
    const MatrixKernels* own = (*set)->find(kernels.type);
    if (own == nullptr) continue;
    if (own->dot == kernels.dot && *names.dots == 0) names.dots = (*set)->name;
    if (own->tile == kernels.tile && *names.tiles == 0) names.tiles = (*set)->name;
  }
  return names;
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
