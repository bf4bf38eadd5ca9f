#include "kernels/attention.h"

#include <algorithm>

#include "kernels/softmax_tile.h"

namespace kvfold {
namespace {

constexpr int64_t kScoreFloats = kTileQueries * kPageTokens;
constexpr int64_t kStateFloats = kTileQueries * sizeof(SoftmaxState) / sizeof(float);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SoftmaxState* states_at(float* memory) { return reinterpret_cast<SoftmaxState*>(memory); }

// Calls use(first_key, keys) for the pages' blocks of [first, last), `first` at a page.
template <typename Use>
void for_blocks(int64_t first, int64_t last, const Use& use) {
  for (int64_t key = first; key < last; key += kPageTokens) use(key, std::min(kPageTokens, last - key));
}

// Scores that a member may store without fusing.
int64_t stored_floats(const Machine& machine) { return machine.shared_floats / machine.team.size(); }

// ---- Absorbed ----

// A row's pages go in runs of this many, each with a softmax of its own; a function of the row's keys alone.
// 256 keys, or as many as keep the runs at 64: a unit is then at least 256 * 16 heads * 1088 = 4.5 M
// multiply-adds. More keys may be fewer runs: 256 pages are 64 runs of 4, 257 are 52 of 5.
int64_t run_keys(int64_t visible) {
  constexpr int64_t kMinPages = 4, kMaxRuns = 64;
  return std::max(kMinPages, ceil_div(ceil_div(visible, kPageTokens), kMaxRuns)) * kPageTokens;
}

struct LatentOp {
  const Machine& machine;
  const Step& step;
  const MlaDims& dims;
  float scale;
  const CacheArray& cache;
  int64_t layer;
  Matrix q, out;
  int64_t first_row;  // of the range: where q and out start

  int64_t groups() const { return ceil_div(dims.heads, kTileQueries); }
  int64_t visible(int64_t i) const { return step.visible[first_row + i]; }
  int64_t num_runs(int64_t i) const { return ceil_div(visible(i), run_keys(visible(i))); }
  int64_t partial_floats() const { return kTileQueries * dims.kv_lora + kStateFloats; }

  // `heads` heads of row i from `head` on.
  QueryTile queries(int64_t i, int64_t head, int64_t heads) const {
    return {q.row(i) + head * dims.latent(), dims.latent(), heads, dims.latent(), visible(i), 0, scale};
  }
  ValueTile values(int64_t i, int64_t head, SoftmaxState* states) const {
    return {out.row(i) + head * dims.kv_lora, dims.kv_lora, dims.kv_lora, states};
  }
  ValueTile partial(float* memory) const {
    return {memory + kStateFloats, dims.kv_lora, dims.kv_lora, states_at(memory)};
  }

  // One latent row is key and, its first kv_lora numbers, value.
  Keys block(int64_t i, int64_t key, int64_t keys, float* tile) const {
    const int32_t page = step.page_list(step.sequence_of[first_row + i])[key / kPageTokens];
    return read_page(cache, layer, page, keys, 0, dims.latent(), tile);
  }

  // A run's softmax into `into`. memory: scores and a tile of keys.
  void attend_run(int64_t i, int64_t group, int64_t run, const ValueTile& into, float* memory) const {
    const int64_t head = group * kTileQueries, heads = std::min(kTileQueries, dims.heads - head);
    const QueryTile tile = queries(i, head, heads);
    const int64_t first = run * run_keys(visible(i)),
                  last = std::min(visible(i), first + run_keys(visible(i)));
    start(into, heads);
    for_blocks(first, last, [&](int64_t key, int64_t keys) {
      const Keys latents = block(i, key, keys, memory + kScoreFloats);
      absorb_keys(tile, key, keys, latents, latents, into, memory);
    });
  }

  // Joins the runs of a row in order. next(run): their softmaxes.
  template <typename Next>
  void join_runs(int64_t i, int64_t group, float* memory, const Next& next) const {
    const int64_t head = group * kTileQueries, heads = std::min(kTileQueries, dims.heads - head);
    const ValueTile into = values(i, head, states_at(memory));
    start(into, heads);
    for (int64_t run = 0; run < num_runs(i); run++) merge(next(run), into, heads);
    finish(into, heads);
  }

  void attend_stored(int64_t i, int64_t head, int64_t heads, float* scores, float* memory) const {
    const QueryTile tile = queries(i, head, heads);
    const ValueTile into = values(i, head, states_at(memory));
    const int64_t stride = visible(i);
    for_blocks(0, visible(i), [&](int64_t key, int64_t keys) {
      store_scores(tile, key, keys, block(i, key, keys, memory + kScoreFloats), scores, stride);
    });
    normalise_scores(tile, scores, stride);
    start(into, heads);
    for_blocks(0, visible(i), [&](int64_t key, int64_t keys) {
      weigh_values(tile, key, keys, scores, stride, block(i, key, keys, memory + kScoreFloats), into);
    });
  }
};

// ---- Decompressed ----

// How many heads and keys of a sequence are expanded at a time, and how many rows' scores are stored.
struct ExpandedTiles {
  int64_t heads, keys;  // keys: a multiple of kPageTokens
  int64_t rows;         // all, where fused
};

ExpandedTiles expanded_tiles(int64_t shared_floats, const MlaDims& dims, int64_t rows, int64_t num_keys,
                             bool fused) {
  constexpr int64_t kKeys = 1024;  // fused: fewer passes over the rows than this saves nothing
  const int64_t all_keys = ceil_div(num_keys, kPageTokens) * kPageTokens;
  const int64_t head_key = dims.qk() + dims.v;
  const int64_t head_states = fused ? 2 * rows : 0;
  const int64_t budget = fused ? shared_floats : shared_floats / 2;
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
    const int64_t least = head_states + kPageTokens * (dims.latent() + head_key);
    refuse_workspace("attend_expanded", fused ? least : 2 * least, shared_floats);
  }
  if (!fused) {
    const int64_t stored = shared_floats - budget;
    if (stored < all_keys) refuse_workspace("attend_expanded with fa=0", 2 * all_keys, shared_floats);
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
  int32_t sequence;
  int64_t first_row, rows, num_keys;
  ExpandedTiles tiles;
  // In the shared space
  float* latents;  // [tiles.keys, latent]
  float* k;        // [tiles.heads, tiles.keys, qk]
  float* v;        // [tiles.heads, tiles.keys, v]
  float* rest;     // fused: states [tiles.heads, rows]; else scores [tiles.heads, tiles.rows, all keys]
  int64_t gathered = -1, expanded = -1, expanded_head = -1;  // what stands there now

  // Keys and values of heads [head, head + heads) for keys [first, first + tiles.keys).
  void expand_tile(int64_t head, int64_t heads, int64_t first) {
    const int64_t n = std::min(tiles.keys, num_keys - first);
    if (gathered != first) {
      machine.team.for_each(ceil_div(n, kPageTokens), [&](int64_t page, int) {
        const int32_t at = step.page_list(sequence)[first / kPageTokens + page];
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
    return {q.row(first_row + row) + head * dims.qk(),
            q.stride,
            count,
            dims.qk(),
            step.visible[first_row + row],
            1,
            scale};
  }
  ValueTile values(int64_t head, int64_t row, SoftmaxState* states) const {
    return {out.row(first_row + row) + head * dims.v, out.stride, dims.v, states};
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
    const int64_t last = std::min({expanded + tiles.keys, num_keys, tile.most_visible()});
    for_blocks(expanded, last, [&](int64_t key, int64_t keys) {
      const Matrix k_h = keys_of(h), v_h = values_of(h);
      use(key, keys, Keys{k_h.row(key - expanded), k_h.stride}, Keys{v_h.row(key - expanded), v_h.stride});
    });
  }

  void attend_fused(int64_t head, int64_t heads) {
    for (int64_t first = 0; first < num_keys; first += tiles.keys) {
      expand_tile(head, heads, first);
      for_tiles(heads, 0, rows, [&](int64_t h, int64_t row, int64_t count, int member) {
        const QueryTile tile = queries(head + h, row, count);
        const ValueTile into = values(head + h, row, states_at(rest) + h * rows + row);
        if (first == 0) start(into, count);
        for_seen_blocks(tile, h, [&](int64_t key, int64_t keys, Keys k_block, Keys v_block) {
          absorb_keys(tile, key, keys, k_block, v_block, into, machine.of(member));
        });
        if (first + tiles.keys >= num_keys) finish(into, count);
      });
    }
  }

  void attend_stored(int64_t head, int64_t heads) {
    const int64_t stride = ceil_div(num_keys, kPageTokens) * kPageTokens;
    for (int64_t from = 0; from < rows; from += tiles.rows) {
      const int64_t to = std::min(rows, from + tiles.rows);
      const auto scores = [&](int64_t h, int64_t row) {
        return rest + (h * tiles.rows + row - from) * stride;
      };
      for (int64_t first = 0; first < num_keys; first += tiles.keys) {
        expand_tile(head, heads, first);
        for_tiles(heads, from, to, [&](int64_t h, int64_t row, int64_t count, int) {
          const QueryTile tile = queries(head + h, row, count);
          for_seen_blocks(tile, h, [&](int64_t key, int64_t keys, Keys k_block, Keys) {
            store_scores(tile, key, keys, k_block, scores(h, row), stride);
          });
        });
      }
      for (int64_t first = 0; first < num_keys; first += tiles.keys) {
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

void append_latent(const Machine& machine, const Step& step, Matrix c_kv, Matrix k_rope,
                   const CacheArray& cache, int64_t layer) {
  constexpr int64_t kRows = 32;
  machine.team.for_each(ceil_div(step.num_rows(), kRows), [&](int64_t unit, int) {
    for (int64_t i = unit * kRows; i < std::min(step.num_rows(), (unit + 1) * kRows); i++) {
      write_slot(cache, layer, step.slots[i], c_kv.row(i), 0, c_kv.width);
      write_slot(cache, layer, step.slots[i], k_rope.row(i), c_kv.width, k_rope.width);
    }
  });
}

int64_t attend_latent_floats(const MlaDims& dims) {
  return kScoreFloats + kPageTokens * dims.latent() + kTileQueries * dims.kv_lora + 2 * kStateFloats;
}

void attend_latent(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                   const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const int64_t rows = range.num_rows();
  if (rows == 0) return;
  const LatentOp op{machine, step, dims, scale, cache, layer, q, out, range.first_row};
  int64_t longest = 0, runs = 0;
  for (int64_t i = 0; i < rows; i++) {
    longest = std::max(longest, op.visible(i));
    runs = std::max(runs, op.num_runs(i));
  }

  if (!range.fused) {
    const int64_t heads = std::min({kTileQueries, dims.heads, stored_floats(machine) / longest});
    const int64_t groups = ceil_div(dims.heads, heads);
    machine.team.for_each(rows * groups, [&](int64_t unit, int member) {
      const int64_t head = unit % groups * heads;
      op.attend_stored(unit / groups, head, std::min(heads, dims.heads - head),
                       machine.shared + member * stored_floats(machine), machine.of(member));
    });
    return;
  }

  // Enough tiles for every member: each goes through the runs of its row by itself.
  const int64_t groups = op.groups();
  const int64_t row_partials = runs * groups * op.partial_floats();
  const int64_t window = machine.shared_floats / row_partials;
  const int64_t tile_memory = kScoreFloats + kPageTokens * dims.latent();
  if (runs == 1 || rows * groups >= 8 * machine.team.size() || window == 0) {
    machine.team.for_each(rows * groups, [&](int64_t unit, int member) {
      const int64_t i = unit / groups, group = unit % groups;
      float* memory = machine.of(member);
      op.join_runs(i, group, memory + tile_memory, [&](int64_t run) {
        const ValueTile partial = op.partial(memory + tile_memory + kStateFloats);
        op.attend_run(i, group, run, partial, memory);
        return partial;
      });
    });
    return;
  }

  // Few tiles: the runs are spread over members, and then joined.
  for (int64_t first = 0; first < rows; first += window) {
    const int64_t n = std::min(window, rows - first);
    const auto partial = [&](int64_t i, int64_t group, int64_t run) {
      return op.partial(machine.shared + (((i - first) * groups + group) * runs + run) * op.partial_floats());
    };
    machine.team.for_each(n * groups * runs, [&](int64_t unit, int member) {
      const int64_t i = first + unit / (groups * runs), group = unit / runs % groups, run = unit % runs;
      if (run >= op.num_runs(i)) return;
      op.attend_run(i, group, run, partial(i, group, run), machine.of(member));
    });
    machine.team.for_each(n * groups, [&](int64_t unit, int member) {
      const int64_t i = first + unit / groups, group = unit % groups;
      op.join_runs(i, group, machine.of(member), [&](int64_t run) { return partial(i, group, run); });
    });
  }
}

int64_t attend_expanded_floats(const KvUp& up) { return std::max(up_panel_floats(up), kScoreFloats); }

void attend_expanded(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up,
                     float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  const PathRange& range = step.range(Path::kDecompressed);
  for (int32_t sequence = range.first_sequence; sequence < range.last_sequence; sequence++) {
    const int64_t first_row = step.row_starts[sequence], rows = step.row_starts[sequence + 1] - first_row;
    const int64_t num_keys = step.kv_lens[sequence];
    const ExpandedTiles tiles = expanded_tiles(machine.shared_floats, dims, rows, num_keys, range.fused);
    float* latents = machine.shared;
    float* k = latents + tiles.keys * dims.latent();
    float* v = k + tiles.heads * tiles.keys * dims.qk();
    float* rest = v + tiles.heads * tiles.keys * dims.v;
    ExpandedOp op{machine,  step,      dims, up,       scale, cache,   layer, q, out,
                  sequence, first_row, rows, num_keys, tiles, latents, k,     v, rest};
    for (int64_t head = 0; head < dims.heads; head += tiles.heads) {
      const int64_t heads = std::min(tiles.heads, dims.heads - head);
      range.fused ? op.attend_fused(head, heads) : op.attend_stored(head, heads);
    }
  }
}

int64_t attend_full_floats(const MlaDims& dims) {
  return kScoreFloats + kStateFloats + kPageTokens * (dims.qk() + dims.v);
}

void attend_full(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                 const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer, Matrix q, Matrix out) {
  const PathRange& range = step.range(Path::kStandard);
  for (int32_t sequence = range.first_sequence; sequence < range.last_sequence; sequence++) {
    const int64_t first_row = step.row_starts[sequence], rows = step.row_starts[sequence + 1] - first_row;
    const int32_t* pages = step.page_list(sequence);
    const int64_t stride = step.kv_lens[sequence];
    const int64_t size = range.fused ? kTileQueries : std::min(kTileQueries, stored_floats(machine) / stride);
    const int64_t row_tiles = ceil_div(rows, size);
    machine.team.for_each(dims.heads * row_tiles, [&](int64_t unit, int member) {
      const int64_t head = unit / row_tiles, row = first_row + unit % row_tiles * size;
      const int64_t count = std::min(size, first_row + rows - row);
      float* scores = range.fused ? machine.of(member) : machine.shared + member * stored_floats(machine);
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
    });
  }
}

void check_attention_fits(const Machine& machine, const Step& step, const MlaDims& dims) {
  for (const Path path : {Path::kStandard, Path::kAbsorbed, Path::kDecompressed}) {
    const PathRange& range = step.range(path);
    for (int32_t sequence = range.first_sequence; sequence < range.last_sequence; sequence++) {
      const int64_t rows = step.row_starts[sequence + 1] - step.row_starts[sequence];
      const int64_t keys = step.kv_lens[sequence];
      if (path == Path::kDecompressed) {
        expanded_tiles(machine.shared_floats, dims, rows, keys, range.fused);
      } else if (!range.fused && stored_floats(machine) < keys) {
        refuse_workspace("attention with fa=0", keys * machine.team.size(), machine.shared_floats);
      }
    }
  }
}

}  // namespace kvfold
