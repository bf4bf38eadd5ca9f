// The decompressed path in float32: keys and values expanded from latents into the workspace, then dropped.

#include "kernels/attention.h"

#include <algorithm>

#include "kernels/attend_rounded.h"
#include "kernels/attention_tiles.h"

namespace kvfold {
namespace {

// How many heads and keys of a sequence are expanded at a time, and for how many rows.
struct ExpandedTiles {
  int64_t heads, keys;  // keys: a multiple of kPageTokens
  int64_t rows;
};

int64_t head_key_floats(const MlaDims& dims) { return dims.qk() + dims.v; }

// A head over a page of keys, for a tile of rows.
int64_t least_tile_floats(const MlaDims& dims, bool fused) {
  return kPageTokens * (dims.latent() + head_key_floats(dims)) + (fused ? kStateFloats : 0);
}

int64_t whole_pages(int64_t keys) { return ceil_div(keys, kPageTokens) * kPageTokens; }

ExpandedTiles expanded_tiles(int64_t shared_floats, const MlaDims& dims, int64_t rows, int64_t num_keys,
                             bool fused) {
  constexpr int64_t kKeys = 1024;  // fused: fewer passes over the rows than this saves nothing
  constexpr int64_t kRowFloats = kStateFloats / kTileQueries;
  const int64_t all_keys = whole_pages(num_keys), head_key = head_key_floats(dims);
  const int64_t head_states = fused ? kRowFloats * rows : 0;
  const int64_t budget =
      fused ? shared_floats
            : tile_floats_beside_scores(shared_floats, least_tile_floats(dims, fused), all_keys);
  const auto heads_for = [&](int64_t keys) {
    return std::min(dims.heads, (budget - keys * dims.latent()) / (keys * head_key + head_states));
  };
  ExpandedTiles tiles{0, fused ? std::min(all_keys, kKeys) : all_keys, rows};
  tiles.heads = heads_for(tiles.keys);
  if (tiles.heads < 1) {
    tiles.heads = 1;
    tiles.keys = (budget - head_states) / (dims.latent() + head_key) / kPageTokens * kPageTokens;
  }
  if (tiles.keys < kPageTokens) {
    tiles.keys = kPageTokens;
    tiles.rows = (budget - kPageTokens * (dims.latent() + head_key)) / kRowFloats;
  }
  if (!fused) {
    const int64_t stored = shared_floats - budget;
    tiles.heads = std::min(tiles.heads, stored / all_keys);
    tiles.rows = std::min(rows, stored / (tiles.heads * all_keys));
  }
  return tiles;
}

struct ExpandedOp {
  const Machine& machine;
  const Step& step;
  const MlaDims& dims;
  const KvUp& up;
  float scale;
  const CacheArray& cache;
  int64_t layer;
  Matrix q, out;
  SequenceRows its;
  ExpandedTiles tiles;
  // In the shared space
  float* latents;  // [tiles.keys, latent]
  float* k;        // [tiles.heads, tiles.keys, qk]
  float* v;        // [tiles.heads, tiles.keys, v]
  float* rest;     // fused: states [tiles.heads, tiles.rows]; else scores [tiles.heads, tiles.rows, all keys]
  int64_t gathered = -1, expanded = -1, expanded_head = -1;  // what stands there now

  // Keys and values of heads [head, head + heads) for keys [first, first + tiles.keys).
  void expand_tile(int64_t head, int64_t heads, int64_t first) {
    const int64_t n = std::min(tiles.keys, its.num_keys - first);
    if (gathered != first) {
      machine.team.for_each(ceil_div(n, kPageTokens), [&](int64_t page, int) {
        const int32_t at = step.page_list(its.sequence)[first / kPageTokens + page];
        copy_page(cache, layer, at, std::min(kPageTokens, n - page * kPageTokens), 0, dims.latent(),
                  latents + page * kPageTokens * dims.latent(), dims.latent());
      });
      gathered = first;
    }
    if (expanded == first && expanded_head == head) return;
    constexpr int64_t kBlock = 512;  // keys for which a unit decodes its head's weights
    const int64_t blocks = ceil_div(n, kBlock);
    machine.team.for_each(heads * blocks, [&](int64_t unit, int member) {
      const int64_t h = unit / blocks, key = unit % blocks * kBlock;
      const float* from = latents + key * dims.latent();
      expand(dims, up, head + h, {from, dims.latent(), from + dims.kv_lora, dims.latent()},
             std::min(kBlock, n - key), machine.of(member), keys_of(h).data + key * dims.qk(), dims.qk(),
             values_of(h).data + key * dims.v, dims.v);
    });
    expanded = first, expanded_head = head;
  }

  Matrix keys_of(int64_t h) const { return {k + h * tiles.keys * dims.qk(), dims.qk(), dims.qk()}; }
  Matrix values_of(int64_t h) const { return {v + h * tiles.keys * dims.v, dims.v, dims.v}; }

  QueryTile queries(int64_t head, int64_t row, int64_t count) const {
    return {q.row(its.first_row + row) + head * dims.qk(),
            q.stride,
            count,
            dims.qk(),
            step.visible[its.first_row + row],
            1,
            scale};
  }
  ValueTile values(int64_t head, int64_t row, SoftmaxState* states) const {
    return {out.row(its.first_row + row) + head * dims.v, out.stride, dims.v, states};
  }

  // Calls use(h, row, count, member) for tiles of rows [first, last) of the first `heads` heads.
  template <typename Use>
  void for_tiles(int64_t heads, int64_t first, int64_t last, const Use& use) const {
    const int64_t count = ceil_div(last - first, kTileQueries);
    machine.team.for_each(heads * count, [&](int64_t unit, int member) {
      const int64_t row = first + unit % count * kTileQueries;
      use(unit / count, row, std::min(kTileQueries, last - row), member);
    });
  }

  // Calls use(key, keys, K, V) for the blocks of the expanded tile that a tile of queries sees.
  template <typename Use>
  void for_seen_blocks(const QueryTile& tile, int64_t h, const Use& use) const {
    const int64_t last = std::min({expanded + tiles.keys, its.num_keys, tile.most_visible()});
    for_blocks(expanded, last, [&](int64_t key, int64_t keys) {
      const Matrix k_h = keys_of(h), v_h = values_of(h);
      use(key, keys, Keys{k_h.row(key - expanded), k_h.stride}, Keys{v_h.row(key - expanded), v_h.stride});
    });
  }

  void attend_fused(int64_t head, int64_t heads) {
    for (int64_t from = 0; from < its.rows; from += tiles.rows) {
      const int64_t to = std::min(its.rows, from + tiles.rows), seen = step.visible[its.first_row + to - 1];
      for (int64_t first = 0; first < seen; first += tiles.keys) {
        expand_tile(head, heads, first);
        for_tiles(heads, from, to, [&](int64_t h, int64_t row, int64_t count, int member) {
          const QueryTile tile = queries(head + h, row, count);
          const ValueTile into = values(head + h, row, states_at(rest) + h * tiles.rows + row - from);
          if (first == 0) start(into, count);
          for_seen_blocks(tile, h, [&](int64_t key, int64_t keys, Keys k_block, Keys v_block) {
            absorb_keys(tile, key, keys, k_block, v_block, into, machine.of(member));
          });
          if (first + tiles.keys >= seen) finish(into, count);
        });
      }
    }
  }

  void attend_stored(int64_t head, int64_t heads) {
    const int64_t stride = whole_pages(its.num_keys);
    for (int64_t from = 0; from < its.rows; from += tiles.rows) {
      const int64_t to = std::min(its.rows, from + tiles.rows);
      const auto scores = [&](int64_t h, int64_t row) {
        return rest + (h * tiles.rows + row - from) * stride;
      };
      for (int64_t first = 0; first < its.num_keys; first += tiles.keys) {
        expand_tile(head, heads, first);
        for_tiles(heads, from, to, [&](int64_t h, int64_t row, int64_t count, int) {
          const QueryTile tile = queries(head + h, row, count);
          for_seen_blocks(tile, h, [&](int64_t key, int64_t keys, Keys k_block, Keys) {
            store_scores(tile, key, keys, k_block, scores(h, row), stride);
          });
        });
      }
      for (int64_t first = 0; first < its.num_keys; first += tiles.keys) {
        expand_tile(head, heads, first);
        for_tiles(heads, from, to, [&](int64_t h, int64_t row, int64_t count, int member) {
          const QueryTile tile = queries(head + h, row, count);
          const ValueTile into = values(head + h, row, states_at(machine.of(member)));
          if (first == 0) {
            normalise_scores(tile, scores(h, row), stride);
            start(into, count);
          }
          for_seen_blocks(tile, h, [&](int64_t key, int64_t keys, Keys, Keys v_block) {
            weigh_values(tile, key, keys, scores(h, row), stride, v_block, into);
          });
        });
      }
    }
  }
};

}  // namespace

int64_t expanded_shared_floats(const MlaDims& dims, bool fused, int64_t keys) {
  return least_tile_floats(dims, fused) + (fused ? 0 : whole_pages(keys));
}

int64_t attend_expanded_floats(const MlaDims& dims, const KvUp& up, bool rounds) {
  return rounds ? attend_expanded_rounded_floats(dims, up) : std::max(up_panel_floats(up), kScoreFloats);
}

void attend_expanded(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up,
                     float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  if (machine.rounds) {
    return attend_expanded_rounded(machine, step, dims, up, scale, cache, layer, q, out);
  }
  const PathRange& range = step.range(Path::kDecompressed);
  for_sequences(step, range, [&](const SequenceRows& its) {
    const ExpandedTiles tiles =
        expanded_tiles(machine.shared_floats, dims, its.rows, its.num_keys, range.fused);
    float* latents = machine.shared;
    float* k = latents + tiles.keys * dims.latent();
    float* v = k + tiles.heads * tiles.keys * dims.qk();
    float* rest = v + tiles.heads * tiles.keys * dims.v;
    ExpandedOp op{machine, step, dims, up, scale, cache, layer, q, out, its, tiles, latents, k, v, rest};
    for (int64_t head = 0; head < dims.heads; head += tiles.heads) {
      const int64_t heads = std::min(tiles.heads, dims.heads - head);
      range.fused ? op.attend_fused(head, heads) : op.attend_stored(head, heads);
    }
  });
}

}  // namespace kvfold
