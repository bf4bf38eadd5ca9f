#include "kernels/attention.h"

#include "kernels/attend_rounded.h"
#include "kernels/attention_tiles.h"
#include "kernels/latent_kernels.h"

namespace kvfold {

void check_attention_fits(const Machine& machine, const Step& step, const MlaDims& dims) {
  for (const Path path : {Path::kStandard, Path::kAbsorbed, Path::kDecompressed}) {
    const PathRange& range = step.range(path);
    for_sequences(step, range, [&](const SequenceRows& its) {
      if (machine.rounds && path != Path::kAbsorbed) {
        check_rounded_fits(machine, dims, path, its.rows, its.num_keys, range.fused);
      } else if (path == Path::kDecompressed) {
        check_expanded_fits(machine, dims, its.rows, its.num_keys, range.fused);
      } else {
        // Scores of a head, or of a tile of heads that share a vector.
        const int64_t stored = its.num_keys * (machine.rounds && path == Path::kAbsorbed ? kHeadLanes : 1);
        if (!range.fused && stored_floats(machine) < stored) {
          refuse_workspace("attention with fa=0", stored * machine.team.size(), machine.shared_floats);
        }
      }
    });
  }
}

}  // namespace kvfold
