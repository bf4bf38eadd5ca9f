#include "kernels/attention.h"

#include "kernels/attend_rounded.h"
#include "kernels/attention_tiles.h"
#include "kernels/latent_kernels.h"

namespace kvfold {

int64_t attention_shared_floats(const MlaDims& dims, bool rounds, Path path, bool fused, int64_t keys) {
  if (rounds && path != Path::kAbsorbed) return rounded_shared_floats(dims, path, fused, keys);
  if (path == Path::kDecompressed) return expanded_shared_floats(dims, fused, keys);
  if (fused) return 0;
  // Scores of a head, or of a tile of heads that share a vector, on one member.
  return whole_lines(keys * (rounds ? kHeadLanes : 1));
}

void check_attention_fits(const Machine& machine, const Step& step, const MlaDims& dims) {
  for (const Path path : {Path::kStandard, Path::kAbsorbed, Path::kDecompressed}) {
    const PathRange& range = step.range(path);
    for_sequences(step, range, [&](const SequenceRows& its) {
      const int64_t least = attention_shared_floats(dims, machine.rounds, path, range.fused, its.num_keys);
      if (least > machine.shared_floats) {
        refuse_workspace(range.fused ? "attention" : "attention with fa=0", least, machine.shared_floats);
      }
    });
  }
}

}  // namespace kvfold
