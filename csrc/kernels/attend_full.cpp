// mla=0 in float32: attention over a cache of full keys and values.

#include "kernels/attention.h"

#include <algorithm>

#include "kernels/attend_rounded.h"
#include "kernels/attention_tiles.h"

namespace kvfold {

int64_t attend_full_floats(const MlaDims& dims, bool rounds) {
  if (rounds) return attend_full_rounded_floats(dims);
  return kScoreFloats + kStateFloats + kPageTokens * (dims.qk() + dims.v);
}

void attend_full(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                 const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer, Matrix q, Matrix out) {
  if (machine.rounds) {
    return attend_full_rounded(machine, step, dims, scale, k_cache, v_cache, layer, q, out);
  }
  const PathRange& range = step.range(Path::kStandard);
  for_sequences(step, range, [&](const SequenceRows& its) {
    const int32_t* pages = step.page_list(its.sequence);
    const int64_t stride = its.num_keys;
    const StoringMembers storing(machine, stride);
    const int64_t size = range.fused ? kTileQueries : std::min(kTileQueries, storing.floats() / stride);
    const int64_t row_tiles = ceil_div(its.rows, size);
    const auto attend = [&](int64_t unit, float* scores, int member) {
      const int64_t head = unit / row_tiles, row = its.first_row + unit % row_tiles * size;
      const int64_t count = std::min(size, its.first_row + its.rows - row);
      SoftmaxState* states = states_at(machine.of(member) + kScoreFloats);
      float* k_tile = machine.of(member) + kScoreFloats + kStateFloats;
      float* v_tile = k_tile + kPageTokens * dims.qk();
      const QueryTile tile{
          q.row(row) + head * dims.qk(), q.stride, count, dims.qk(), step.visible[row], 1, scale};
      const ValueTile into{out.row(row) + head * dims.v, out.stride, dims.v, states};
      const auto k_block = [&](int64_t key, int64_t keys) {
        return read_page(k_cache, layer, pages[key / kPageTokens], keys, head * dims.qk(), dims.qk(), k_tile);
      };
      const auto v_block = [&](int64_t key, int64_t keys) {
        return read_page(v_cache, layer, pages[key / kPageTokens], keys, head * dims.v, dims.v, v_tile);
      };
      start(into, count);
      if (range.fused) {
        for_blocks(0, tile.most_visible(), [&](int64_t key, int64_t keys) {
          absorb_keys(tile, key, keys, k_block(key, keys), v_block(key, keys), into, scores);
        });
        finish(into, count);
        return;
      }
      for_blocks(0, tile.most_visible(), [&](int64_t key, int64_t keys) {
        store_scores(tile, key, keys, k_block(key, keys), scores, stride);
      });
      normalise_scores(tile, scores, stride);
      for_blocks(0, tile.most_visible(), [&](int64_t key, int64_t keys) {
        weigh_values(tile, key, keys, scores, stride, v_block(key, keys), into);
      });
    };
    if (!range.fused) return storing.for_each(dims.heads * row_tiles, attend);
    machine.team.for_each(dims.heads * row_tiles,
                          [&](int64_t unit, int member) { attend(unit, machine.of(member), member); });
  });
}

}  // namespace kvfold
