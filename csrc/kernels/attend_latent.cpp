// The absorbed path: all heads of a row over the latents themselves.

#include "kernels/attention.h"

#include <algorithm>

#include "kernels/attend_latent_rounded.h"
#include "kernels/attention_tiles.h"

namespace kvfold {
namespace {

struct LatentOp {
  const AbsorbedRows& rows;
  const MlaDims& dims;
  float scale;
  const CacheArray& cache;
  int64_t layer;
  Matrix q, out;

  int64_t groups() const { return ceil_div(dims.heads, kTileQueries); }
  int64_t partial_floats() const { return kTileQueries * dims.kv_lora + kStateFloats; }

  // `heads` heads of row i from `head` on.
  QueryTile queries(int64_t i, int64_t head, int64_t heads) const {
    return {q.row(i) + head * dims.latent(), dims.latent(), heads, dims.latent(), rows.visible(i), 0, scale};
  }
  ValueTile values(int64_t i, int64_t head, SoftmaxState* states) const {
    return {out.row(i) + head * dims.kv_lora, dims.kv_lora, dims.kv_lora, states};
  }
  ValueTile partial(float* memory) const {
    return {memory + kStateFloats, dims.kv_lora, dims.kv_lora, states_at(memory)};
  }

  // One latent row is key and, its first kv_lora numbers, value.
  Keys block(int64_t i, int64_t key, int64_t keys, float* tile) const {
    return read_page(cache, layer, rows.page(i, key), keys, 0, dims.latent(), tile);
  }

  // A run's softmax into `into`. memory: scores and a tile of keys.
  void attend_run(int64_t i, int64_t group, int64_t run, const ValueTile& into, float* memory) const {
    const int64_t head = group * kTileQueries, heads = std::min(kTileQueries, dims.heads - head);
    const QueryTile tile = queries(i, head, heads);
    start(into, heads);
    rows.for_pages(i, run, [&](int64_t key, int64_t keys) {
      const Keys latents = block(i, key, keys, memory + kScoreFloats);
      absorb_keys(tile, key, keys, latents, latents, into, memory);
    });
  }

  // The softmax of a run with that of those before it.
  void append_run(int64_t group, float* from, float* into) const {
    const int64_t head = group * kTileQueries, heads = std::min(kTileQueries, dims.heads - head);
    merge(partial(from), partial(into), heads);
  }

  // Joins the runs of a row: AbsorbedRows::for_runs. stretch: partial_floats.
  template <typename End, typename Next>
  void join_runs(int64_t i, int64_t group, float* memory, float* stretch, const End& end_of_first,
                 const Next& next) const {
    const int64_t head = group * kTileQueries, heads = std::min(kTileQueries, dims.heads - head);
    const ValueTile into = values(i, head, states_at(memory));
    start(into, heads);
    rows.for_stretches(i, [&](int64_t first, int64_t last) {
      float* joined = next(first);
      if (int64_t run = end_of_first(first); run < last) {
        start(partial(stretch), heads);
        append_run(group, joined, stretch);
        for (joined = stretch; run < last; run++) append_run(group, next(run), joined);
      }
      merge(partial(joined), into, heads);
    });
    finish(into, heads);
  }

  void attend_stored(int64_t i, int64_t head, int64_t heads, float* scores, float* memory) const {
    const QueryTile tile = queries(i, head, heads);
    const ValueTile into = values(i, head, states_at(memory));
    const int64_t stride = rows.visible(i);
    for_blocks(0, rows.visible(i), [&](int64_t key, int64_t keys) {
      store_scores(tile, key, keys, block(i, key, keys, memory + kScoreFloats), scores, stride);
    });
    normalise_scores(tile, scores, stride);
    start(into, heads);
    for_blocks(0, rows.visible(i), [&](int64_t key, int64_t keys) {
      weigh_values(tile, key, keys, scores, stride, block(i, key, keys, memory + kScoreFloats), into);
    });
  }
};

}  // namespace

void append_latent(const Machine& machine, const Step& step, Matrix c_kv, Matrix k_rope,
                   const CacheArray& cache, int64_t layer) {
  constexpr int64_t kRows = 32;  // 18,432 numbers to be rounded
  machine.team.for_each(ceil_div(step.num_rows(), kRows), [&](int64_t unit, int) {
    for (int64_t i = unit * kRows; i < std::min(step.num_rows(), (unit + 1) * kRows); i++) {
      write_slot(cache, layer, step.slots[i], c_kv.row(i), 0, c_kv.width);
      write_slot(cache, layer, step.slots[i], k_rope.row(i), c_kv.width, k_rope.width);
    }
  });
}

int64_t attend_latent_floats(const MlaDims& dims, bool rounds) {
  if (rounds) return attend_latent_rounded_floats(dims);
  return kScoreFloats + kPageTokens * dims.latent() + 2 * kTileQueries * dims.kv_lora + 3 * kStateFloats;
}

void attend_latent(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                   const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const AbsorbedRows rows{step, range.first_row, range.num_rows()};
  if (rows.num_rows == 0) return;
  if (machine.rounds) {
    return attend_latent_rounded(machine, rows, range.fused, dims, scale, cache, layer, q, out);
  }
  const LatentOp op{rows, dims, scale, cache, layer, q, out};
  if (!range.fused) {
    const int64_t longest = rows.most_visible();
    const StoringMembers storing(machine, longest);
    const int64_t heads = std::min({kTileQueries, dims.heads, storing.floats() / longest});
    const int64_t groups = ceil_div(dims.heads, heads);
    storing.for_each(rows.num_rows * groups, [&](int64_t unit, float* scores, int member) {
      const int64_t head = unit % groups * heads;
      op.attend_stored(unit / groups, head, std::min(heads, dims.heads - head), scores, machine.of(member));
    });
    return;
  }

  const int64_t tile_memory = kScoreFloats + kPageTokens * dims.latent();
  rows.for_runs(
      machine, op.groups(), op.partial_floats(), 1,
      [&](int member) { return machine.of(member) + tile_memory + kStateFloats; },
      [](int64_t, int64_t, int) {},
      [&](int64_t i, int64_t group, int64_t run, int64_t, float* partial, int member) {
        op.attend_run(i, group, run, op.partial(partial), machine.of(member));
      },
      [&](int64_t group, float* from, float* into) { op.append_run(group, from, into); },
      [&](int64_t i, int64_t group, int64_t, int64_t, int member, const auto& end_of_first,
          const auto& next) {
        float* memory = machine.of(member) + tile_memory;
        op.join_runs(i, group, memory, memory + kStateFloats + op.partial_floats(), end_of_first, next);
      });
}

}  // namespace kvfold
