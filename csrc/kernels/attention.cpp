#include "kernels/attention.h"

#include "kernels/attend_rounded.h"
#include "kernels/attention_tiles.h"
#include "kernels/latent_kernels.h"

namespace kvfold {

void check_attention_fits(const Machine& machine, const Step& step, const MlaDims& dims) {
  for (const Path path : {Path::kStandard, Path::kAbsorbed, Path::kDecompressed}) {
    const PathRange& range = step.range(path);
    for (int32_t sequence = range.first_sequence; sequence < range.last_sequence; sequence++) {
      const int64_t rows = step.row_starts[sequence + 1] - step.row_starts[sequence];
      const int64_t keys = step.kv_lens[sequence];
      if (machine.rounds && path != Path::kAbsorbed) {
        check_rounded_fits(machine, dims, path, rows, keys, range.fused);
      } else if (path == Path::kDecompressed) {
        check_expanded_fits(machine, dims, rows, keys, range.fused);
      } else {
        // Scores of a head, or of a tile of heads that share a vector.
        const int64_t stored = keys * (machine.rounds && path == Path::kAbsorbed ? kHeadLanes : 1);
        if (!range.fused && stored_floats(machine) < stored) {
          refuse_workspace("attention with fa=0", stored * machine.team.size(), machine.shared_floats);
        }
      }
    }
  }
}

}  // namespace kvfold
