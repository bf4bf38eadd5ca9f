#include "kernels/attend_rounded.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/attention_tiles.h"
#include "kernels/rounded_expand.h"

namespace kvfold {
namespace {

// A unit of attention: 192 rows of a head over a tile of keys, whole groups of every set. A block of keys
// comes from beyond the second-level cache once for all groups; their queries, values and the block are 250
// KB. 2048 rows, in turn: 70 GMAC/s with 96 rows and tiles of 1024 keys, 71 with 96 and 2048, 76 with 192 and
// 2048, 70 with 4096.
constexpr int64_t kUnitRows = 192;
static_assert(kUnitRows % kWholeGroups == 0);
constexpr int64_t kMostTileKeys = 2048, kLeastTileKeys = 256;
constexpr int64_t kSoftmaxFloats = sizeof(Softmax) / sizeof(float);

// The numbers of a head as panels hold them.
struct HeadShape {
  int64_t heads, qk, v;
  PairWords words;

  int64_t qk_words() const { return words.row_words(qk); }
  int64_t width() const { return panels_of(v) * kPanelLanes; }
  int64_t key_words() const { return qk_words() + width() / 2 + words.scale_words; }  // of one head
};
HeadShape shape_of(const MlaDims& dims, const PairWords& words = *isa().pairs) {
  return {dims.heads, dims.qk(), dims.v, words};
}

// How many heads and keys of a sequence stand expanded at a time, and for how many rows.
struct TileSizes {
  int64_t heads, keys;  // keys: whole blocks
  int64_t rows;
  int64_t stride;  // of stored scores
};

// Latents as products take them, and their rope parts.
int64_t latent_floats(const MlaDims& dims, Path path, int64_t keys) {
  return path == Path::kDecompressed ? rounded_latent_floats(dims, keys) + whole_lines(keys * dims.rope) : 0;
}

// Beside heads: latents, and what rounding up to whole lines costs.
int64_t fixed_floats(const MlaDims& dims, Path path, int64_t keys) {
  return latent_floats(dims, path, keys) + 5 * kLineFloats;
}

int64_t whole_blocks(int64_t keys) { return ceil_div(keys, kBlockKeys) * kBlockKeys; }

// A head over a block of keys, for a unit of rows.
int64_t least_tile_floats(const MlaDims& dims, Path path) {
  return fixed_floats(dims, path, kBlockKeys) + kBlockKeys * shape_of(dims, kMostWords).key_words() +
         kSoftmaxFloats * kUnitRows;
}

TileSizes tile_sizes(const Machine& machine, const MlaDims& dims, Path path, int64_t rows, int64_t num_keys,
                     bool fused) {
  const HeadShape shape = shape_of(dims);
  const int64_t all_keys = whole_blocks(num_keys);
  const int64_t budget =
      fused ? machine.shared_floats
            : tile_floats_beside_scores(machine.shared_floats, least_tile_floats(dims, path), all_keys);
  const auto heads_for = [&](int64_t keys) {
    return std::min(shape.heads, (budget - fixed_floats(dims, path, keys)) /
                                     (keys * shape.key_words() + kSoftmaxFloats * rows));
  };
  TileSizes tiles{0, std::min(all_keys, kMostTileKeys), rows, 0};
  // All heads at once round latents once; fewer keys then cost little.
  while (tiles.keys > kLeastTileKeys && heads_for(tiles.keys) < shape.heads) tiles.keys -= kBlockKeys;
  if (heads_for(tiles.keys) < 1) tiles.keys = kBlockKeys;
  tiles.heads = heads_for(tiles.keys);
  if (tiles.heads < 1) {
    tiles.heads = 1;
    tiles.rows =
        (budget - fixed_floats(dims, path, kBlockKeys) - kBlockKeys * shape.key_words()) / kSoftmaxFloats;
  }
  if (!fused) {
    tiles.stride = all_keys;
    const int64_t stored = machine.shared_floats - budget, rows_of_all = stored / all_keys;
    tiles.heads = std::min(tiles.heads, rows_of_all);
    tiles.rows = std::min(tiles.rows, rows_of_all / tiles.heads);
  }
  return tiles;
}

// A tile of keys in the shared space.
struct KeyTile {
  HeadShape shape;
  int64_t keys;         // that it has room for
  uint32_t* k;          // [heads, panels of keys, qk_words, lanes]
  uint32_t* v;          // [heads, panels of columns, words of keys, lanes]
  float* value_scales;  // [heads, keys], where numbers have scales

  uint32_t* k_of(int64_t h, int64_t key) const {
    return k + (h * keys + key) * shape.qk_words();
  }  // at a panel
  int64_t v_stride() const { return keys / 2 * kPanelLanes; }
  uint32_t* v_of(int64_t h, int64_t key) const {  // key even
    return v + h * panels_of(shape.v) * v_stride() + key / 2 * kPanelLanes;
  }
  float* value_scales_of(int64_t h, int64_t key) const {
    return value_scales + (h * keys + key) * shape.words.scale_words;
  }

  // Keys [key, key + n) of a head, `key` at a panel.
  void put_k(int64_t h, int64_t key, int64_t n, const float* y) const {
    for (int64_t i = 0; i < n; i += kPanelLanes) {
      isa().pairs->pack_keys(y + i * shape.qk, shape.qk, std::min(kPanelLanes, n - i), shape.qk,
                             k_of(h, key + i));
    }
  }
  void put_v(int64_t h, int64_t key, int64_t n, const float* y) const {
    isa().pairs->pack_values(y, shape.v, n, shape.v, v_of(h, key), v_stride(), value_scales_of(h, key));
  }
};

// copy_page, whose float16 goes number by number: 2 ns each, 15 % of a prompt with mla=0.
void copy_numbers(const CacheArray& cache, int64_t layer, int64_t page, int64_t keys, int64_t start,
                  int64_t count, float* out) {
  if (cache.type != CacheType::kF16) {
    return copy_page(cache, layer, page, keys, start, count, out, count);
  }
  for (int64_t i = 0; i < keys; i++) {
    isa().pairs->widen_f16(cache.row(layer, page * kPageTokens + i) + 2 * start, count, out + i * count);
  }
}

// Keys and values of a sequence out of its latents.
struct LatentSource {
  const Machine& machine;
  const int32_t* pages;
  const CacheArray& cache;
  int64_t layer;
  RoundedLatents latents;
  float* rope;           // [keys, dims.rope]
  int64_t rounded = -1;  // first key of what stands in both

  void fill(const KeyTile& tile, int64_t head, int64_t heads, int64_t first, int64_t n) {
    const MlaDims& dims = latents.dims;
    if (rounded != first) {
      machine.team.for_each(ceil_div(n, kLatentKeys), [&](int64_t unit, int member) {
        const int64_t key = unit * kLatentKeys, keys = std::min(kLatentKeys, n - key);
        float* rows = machine.of(member);
        for_blocks(key, key + keys, [&](int64_t at, int64_t count) {
          copy_numbers(cache, layer, pages[(first + at) / kPageTokens], count, 0, dims.latent(),
                       rows + (at - key) * dims.latent());
        });
        latents.round(rows, dims.latent(), key, keys);
        for (int64_t i = 0; i < keys; i++) {
          std::copy_n(rows + i * dims.latent() + dims.kv_lora, dims.rope, rope + (key + i) * dims.rope);
        }
      });
      rounded = first;
    }
    const int64_t blocks = ceil_div(n, kUnitKeys);
    machine.team.for_each(heads * blocks, [&](int64_t unit, int member) {
      const int64_t h = unit / blocks, key = unit % blocks * kUnitKeys, keys = std::min(kUnitKeys, n - key);
      tile.put_v(h, key, keys, expand_values(latents, head + h, key, keys, machine.of(member)));
      float* k = expand_keys(latents, head + h, key, keys, machine.of(member));
      for (int64_t i = 0; i < keys; i++) {
        std::copy_n(rope + (key + i) * dims.rope, dims.rope, k + i * dims.qk() + dims.nope);
      }
      tile.put_k(h, key, keys, k);
    });
  }
};

// Out of a cache of keys and values.
struct FullSource {
  const Machine& machine;
  const int32_t* pages;
  const CacheArray &k_cache, &v_cache;
  int64_t layer;

  // Keys of one page, to `key` of head h of the tile.
  void fill_page(const KeyTile& tile, int64_t h, int64_t head, int64_t key, int32_t page, int64_t n,
                 float* scratch) const {
    const int64_t qk = tile.shape.qk, v = tile.shape.v;
    copy_numbers(k_cache, layer, page, n, head * qk, qk, scratch);
    tile.put_k(h, key, n, scratch);
    copy_numbers(v_cache, layer, page, n, head * v, v, scratch);
    tile.put_v(h, key, n, scratch);
  }

  void fill(const KeyTile& tile, int64_t head, int64_t heads, int64_t first, int64_t n) {
    const int64_t blocks = ceil_div(n, kPageTokens);
    machine.team.for_each(heads * blocks, [&](int64_t unit, int member) {
      const int64_t h = unit / blocks, key = unit % blocks * kPageTokens;
      fill_page(tile, h, head + h, key, pages[(first + key) / kPageTokens], std::min(kPageTokens, n - key),
                machine.of(member));
    });
  }
};

// What a member computes a unit of rows in.
struct UnitMemory {
  uint32_t* q;        // [groups, qk_words, rows of a group]
  float* values;      // [kUnitRows, width]
  float* scores;      // [rows of a group, kBlockKeys]
  uint32_t* weights;  // [rows of a group, words of kBlockKeys]

  static int64_t floats(const HeadShape& shape) {
    return kUnitRows * (shape.qk_words() + shape.width()) + shape.words.group_rows * kBlockKeys * 2;
  }
  UnitMemory(const HeadShape& shape, float* memory)
      : q(reinterpret_cast<uint32_t*>(memory)),
        values(memory + kUnitRows * shape.qk_words()),
        scores(values + kUnitRows * shape.width()),
        weights(reinterpret_cast<uint32_t*>(scores + shape.words.group_rows * kBlockKeys)) {}
};

struct Rows {
  const Step& step;
  const HeadShape shape;
  const float scale_log2e;
  const Matrix q, out;
  const int64_t first_row;  // of the sequence

  int64_t seen(int64_t row) const { return step.visible[first_row + row]; }

  void pack(int64_t head, int64_t row, int64_t count, uint32_t* to) const {
    const int64_t group_rows = shape.words.group_rows;
    for (int64_t i = 0; i < count; i += group_rows, to += shape.qk_words() * group_rows) {
      const float* from = q.row(first_row + row + i) + head * shape.qk;
      const int64_t rows = std::min(group_rows, count - i);
      // Rows of all heads are pages apart, which no processor reads ahead by itself.
      for (int64_t next = i + group_rows; next < std::min(count, i + 2 * group_rows); next++) {
        const float* row_of = q.row(first_row + row + next) + head * shape.qk;
        for (int64_t c = 0; c < shape.qk; c += kLineFloats) __builtin_prefetch(row_of + c);
      }
      isa().pairs->pack_rows(from, q.stride, rows, shape.qk, to);
    }
  }
  float* out_of(int64_t head, int64_t row) const { return out.row(first_row + row) + head * shape.v; }

  // A group of rows over one block of keys that stands at `key` of head h of the tile; row i sees the first
  // `seen` + i of it.
  void meet(const KeyTile& tile, int64_t h, int64_t key, int64_t keys, const uint32_t* q_group, int64_t rows,
            int64_t seen, Softmax* states, float* values, const UnitMemory& memory) const {
    const PairKernels& pairs = *isa().pairs;
    pairs.scores(q_group, rows, tile.k_of(h, key), shape.qk, keys, memory.scores, kBlockKeys);
    pairs.raise(memory.scores, kBlockKeys, rows, seen, keys, scale_log2e, states, values, shape.width());
    add(tile, h, key, keys, memory.scores, kBlockKeys, rows, seen, states, values, memory);
  }
  // The same once scores are there, `stride` apart, and no exponent rises any more.
  void add(const KeyTile& tile, int64_t h, int64_t key, int64_t keys, float* scores, int64_t stride,
           int64_t rows, int64_t seen, Softmax* states, float* values, const UnitMemory& memory) const {
    const PairKernels& pairs = *isa().pairs;
    pairs.weigh(scores, stride, rows, seen, keys, scale_log2e, tile.value_scales_of(h, key), states,
                memory.weights);
    pairs.add_values(memory.weights, states, rows, keys, tile.v_of(h, key), tile.v_stride(),
                     panels_of(shape.v), values);
  }
};

template <class Source>
struct RoundedAttention {
  const Machine& machine;
  const Rows& all;
  Source& source;
  const TileSizes tiles;
  const KeyTile tile;
  Softmax* states;  // [tiles.heads, tiles.rows]
  float* stored;    // unfused: scores [tiles.heads, tiles.rows, tiles.stride]
  int64_t rows, num_keys;
  int64_t standing = -1, standing_head = -1;  // which keys the tile holds

  int64_t fill(int64_t head, int64_t heads, int64_t first) {
    const int64_t n = std::min(tiles.keys, num_keys - first);
    if (standing != first || standing_head != head) source.fill(tile, head, heads, first, n);
    standing = first, standing_head = head;
    return n;
  }

  // Calls use(h, row, count, member) for units of rows [from, to) that see key `first`, head by head: what a
  // head has in a tile stays in the second-level cache.
  template <class Use>
  void for_units(int64_t heads, int64_t from, int64_t to, int64_t first, const Use& use) const {
    const int64_t blind = std::max<int64_t>(0, first + 1 - all.seen(from));  // rows before them see less
    if (blind >= to - from) return;
    const int64_t start = from + blind / kUnitRows * kUnitRows;
    const int64_t count = ceil_div(to - start, kUnitRows);
    machine.team.for_each(heads * count, [&](int64_t unit, int member) {
      const int64_t row = start + (count - 1 - unit % count) * kUnitRows;
      use(unit / count, row, std::min(kUnitRows, to - row), member);
    });
  }

  // Calls use(group, its rows, key, keys, seen) for the groups of a unit and the blocks of the tile they see:
  // key within the tile, `keys` of which the last row sees.
  template <class Use>
  void for_seen(int64_t row, int64_t count, int64_t first, int64_t n, const Use& use) const {
    const int64_t group_rows = all.shape.words.group_rows;
    for (int64_t key = 0; key < n; key += kBlockKeys) {
      for (int64_t i = 0; i < count; i += group_rows) {
        const int64_t group = std::min(group_rows, count - i), seen = all.seen(row + i) - first - key;
        const int64_t keys = std::min({kBlockKeys, n - key, seen + group - 1});
        if (keys > 0) use(i, group, key, keys, seen);
      }
    }
  }

  void load(int64_t head, int64_t row, int64_t count, float* values) const {
    for (int64_t i = 0; i < count; i++) {
      std::memcpy(values + i * all.shape.width(), all.out_of(head, row + i), all.shape.v * 4);
    }
  }
  // Sums of weighted values, or where no keys are to come their mean.
  void store(int64_t head, int64_t row, int64_t count, const float* values, const Softmax* state,
             bool last) const {
    for (int64_t i = 0; i < count; i++) {
      float* to = all.out_of(head, row + i);
      std::memcpy(to, values + i * all.shape.width(), all.shape.v * 4);
      if (!last) continue;
      for (int64_t c = 0; c < all.shape.v; c++) to[c] /= state[i].sum;
    }
  }

  // Adds what rows [from, to) see of tile `first`. meet(...): one group and one block.
  template <class Meet>
  void attend_tile(int64_t head, int64_t heads, int64_t from, int64_t to, int64_t first, int64_t n,
                   const Meet& meet) const {
    for_units(heads, from, to, first, [&](int64_t h, int64_t row, int64_t count, int member) {
      const UnitMemory memory(all.shape, machine.of(member));
      Softmax* state = states + h * tiles.rows + row - from;
      std::memset(memory.values, 0, count * all.shape.width() * 4);
      if (first == 0) {
        std::fill_n(state, count, Softmax{});
      } else {
        load(head + h, row, count, memory.values);
      }
      meet(h, row, count, state, memory);
      store(head + h, row, count, memory.values, state, first + n >= all.seen(row + count - 1));
    });
  }

  void attend_fused(int64_t head, int64_t heads) {
    for (int64_t from = 0; from < rows; from += tiles.rows) {
      const int64_t to = std::min(rows, from + tiles.rows);
      for (int64_t first = 0; first < all.seen(to - 1); first += tiles.keys) {
        const int64_t n = fill(head, heads, first);
        attend_tile(head, heads, from, to, first, n,
                    [&](int64_t h, int64_t row, int64_t count, Softmax* state, const UnitMemory& memory) {
                      all.pack(head + h, row, count, memory.q);
                      for_seen(row, count, first, n,
                               [&](int64_t i, int64_t group, int64_t key, int64_t keys, int64_t seen) {
                                 all.meet(tile, h, key, keys, memory.q + i * all.shape.qk_words(), group,
                                          seen, state + i, memory.values + i * all.shape.width(), memory);
                               });
                    });
      }
    }
  }

  // fa=0: all scores of some rows first, then their largest, then weights and values.
  void attend_stored(int64_t head, int64_t heads) {
    const PairKernels& pairs = *isa().pairs;
    for (int64_t from = 0; from < rows; from += tiles.rows) {
      const int64_t to = std::min(rows, from + tiles.rows);
      const auto scores = [&](int64_t h, int64_t row, int64_t key) {
        return stored + (h * tiles.rows + row - from) * tiles.stride + key;
      };
      for (int64_t first = 0; first < num_keys; first += tiles.keys) {
        const int64_t n = fill(head, heads, first);
        for_units(heads, from, to, first, [&](int64_t h, int64_t row, int64_t count, int member) {
          const UnitMemory memory(all.shape, machine.of(member));
          all.pack(head + h, row, count, memory.q);
          for_seen(row, count, first, n, [&](int64_t i, int64_t group, int64_t key, int64_t keys, int64_t) {
            pairs.scores(memory.q + i * all.shape.qk_words(), group, tile.k_of(h, key), all.shape.qk, keys,
                         scores(h, row + i, first + key), tiles.stride);
          });
        });
      }
      for (int64_t first = 0; first < num_keys; first += tiles.keys) {
        const int64_t n = fill(head, heads, first);
        attend_tile(head, heads, from, to, first, n,
                    [&](int64_t h, int64_t row, int64_t count, Softmax* state, const UnitMemory& memory) {
                      if (first == 0) {
                        pairs.raise(scores(h, row, 0), tiles.stride, count, all.seen(row), num_keys,
                                    all.scale_log2e, state, memory.values, 0);
                      }
                      for_seen(row, count, first, n,
                               [&](int64_t i, int64_t group, int64_t key, int64_t keys, int64_t seen) {
                                 all.add(tile, h, key, keys, scores(h, row + i, first + key), tiles.stride,
                                         group, seen, state + i, memory.values + i * all.shape.width(),
                                         memory);
                               });
                    });
      }
    }
  }

  void attend(bool fused) {
    for (int64_t head = 0; head < all.shape.heads; head += tiles.heads) {
      const int64_t heads = std::min(tiles.heads, all.shape.heads - head);
      fused ? attend_fused(head, heads) : attend_stored(head, heads);
    }
  }
};

// The parts of the shared space.
struct SharedParts {
  float* at;
  float* take(int64_t floats) {
    float* part = at;
    at += whole_lines(floats);
    return part;
  }
  uint32_t* words(int64_t n) { return reinterpret_cast<uint32_t*>(take(n)); }
};

KeyTile key_tile(const HeadShape& shape, int64_t heads, int64_t keys, SharedParts& parts) {
  uint32_t* k = parts.words(heads * keys * shape.qk_words());
  uint32_t* v = parts.words(heads * keys * shape.width() / 2);
  return {shape, keys, k, v, parts.take(heads * keys * shape.words.scale_words)};
}

template <class Source>
void attend_sequence(const Machine& machine, const Rows& all, Source& source, const TileSizes& tiles,
                     SharedParts& parts, const SequenceRows& its, bool fused) {
  const KeyTile tile = key_tile(all.shape, tiles.heads, tiles.keys, parts);
  auto* states = reinterpret_cast<Softmax*>(parts.take(kSoftmaxFloats * tiles.heads * tiles.rows));
  RoundedAttention<Source> attention{machine, all,      source,   tiles,       tile,
                                     states,  parts.at, its.rows, its.num_keys};
  attention.attend(fused);
}

float scale_log2e(float scale) { return scale * 1.44269504f; }

}  // namespace

int64_t rounded_shared_floats(const MlaDims& dims, Path path, bool fused, int64_t keys) {
  return least_tile_floats(dims, path) + (fused ? 0 : whole_blocks(keys));
}

int64_t attend_expanded_rounded_floats(const MlaDims& dims, const KvUp& up) {
  return std::max({expand_rounded_floats(dims, up), kLatentKeys * dims.latent(),
                   UnitMemory::floats(shape_of(dims, kMostWords))});
}

void attend_expanded_rounded(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up,
                             float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  const PathRange& range = step.range(Path::kDecompressed);
  for_sequences(step, range, [&](const SequenceRows& its) {
    const TileSizes tiles =
        tile_sizes(machine, dims, Path::kDecompressed, its.rows, its.num_keys, range.fused);
    SharedParts parts{machine.shared};
    float* latents = parts.take(rounded_latent_floats(dims, tiles.keys));
    float* rope = parts.take(tiles.keys * dims.rope);
    LatentSource source{machine, step.page_list(its.sequence),    cache,
                        layer,   {dims, up, latents, tiles.keys}, rope};
    const Rows all{step, shape_of(dims), scale_log2e(scale), q, out, its.first_row};
    attend_sequence(machine, all, source, tiles, parts, its, range.fused);
  });
}

namespace {

// Few rows over many keys: runs of keys, each with a softmax of its own, joined in order. A function of the
// keys alone.
int64_t run_keys(int64_t num_keys) {
  constexpr int64_t kMostRuns = 64;
  return std::max(2 * kBlockKeys, ceil_div(ceil_div(num_keys, kMostRuns), kBlockKeys) * kBlockKeys);
}

struct RunsOfKeys {
  const Machine& machine;
  const Rows& all;
  const FullSource& source;
  int64_t rows, num_keys;

  int64_t num_runs() const { return ceil_div(num_keys, run_keys(num_keys)); }
  int64_t partial_floats() const { return whole_lines(rows * (kSoftmaxFloats + all.shape.width())); }
  int64_t shared_floats() const { return all.shape.heads * num_runs() * partial_floats(); }

  static int64_t member_floats(const HeadShape& shape) {
    return UnitMemory::floats(shape) + kBlockKeys * shape.key_words() +
           kPageTokens * std::max(shape.qk, shape.v) + 3 * kLineFloats;
  }

  void attend() const {
    const int64_t runs = num_runs(), width = all.shape.width();
    const auto partial = [&](int64_t head, int64_t run) {
      return machine.shared + (head * runs + run) * partial_floats();
    };
    machine.team.for_each(all.shape.heads * runs, [&](int64_t unit, int member) {
      const int64_t head = unit / runs, run = unit % runs;
      const int64_t first = run * run_keys(num_keys), last = std::min(num_keys, first + run_keys(num_keys));
      const UnitMemory memory(all.shape, machine.of(member));
      SharedParts parts{machine.of(member) + whole_lines(UnitMemory::floats(all.shape))};
      const KeyTile tile = key_tile(all.shape, 1, kBlockKeys, parts);
      auto* states = reinterpret_cast<Softmax*>(partial(head, run));
      float* values = partial(head, run) + kSoftmaxFloats * rows;
      std::fill_n(states, rows, Softmax{});
      std::memset(values, 0, rows * width * 4);
      all.pack(head, 0, rows, memory.q);
      for (int64_t key = first; key < last; key += kBlockKeys) {
        const int64_t seen = all.seen(0) - key, keys = std::min({kBlockKeys, last - key, seen + rows - 1});
        for_blocks(key, key + keys, [&](int64_t at, int64_t n) {
          source.fill_page(tile, 0, head, at - key, source.pages[at / kPageTokens], n, parts.at);
        });
        all.meet(tile, 0, 0, keys, memory.q, rows, seen, states, values, memory);
      }
    });
    machine.team.for_each(all.shape.heads, [&](int64_t head, int) {
      for (int64_t i = 0; i < rows; i++) {
        const auto state = [&](int64_t run) { return reinterpret_cast<Softmax*>(partial(head, run))[i]; };
        float exponent = state(0).exponent, sum = 0.0f;
        for (int64_t run = 1; run < runs; run++) exponent = std::max(exponent, state(run).exponent);
        float* to = all.out_of(head, i);
        std::memset(to, 0, all.shape.v * 4);
        for (int64_t run = 0; run < runs; run++) {
          const float share = std::exp2(state(run).exponent - exponent);
          sum += state(run).sum * share;
          const float* from = partial(head, run) + kSoftmaxFloats * rows + i * width;
          for (int64_t c = 0; c < all.shape.v; c++) to[c] += from[c] * share;
        }
        for (int64_t c = 0; c < all.shape.v; c++) to[c] /= sum;
      }
    });
  }
};

}  // namespace

int64_t attend_full_rounded_floats(const MlaDims& dims) {
  return RunsOfKeys::member_floats(shape_of(dims, kMostWords));
}

void attend_full_rounded(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                         const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer, Matrix q,
                         Matrix out) {
  const PathRange& range = step.range(Path::kStandard);
  for_sequences(step, range, [&](const SequenceRows& its) {
    FullSource source{machine, step.page_list(its.sequence), k_cache, v_cache, layer};
    const Rows all{step, shape_of(dims), scale_log2e(scale), q, out, its.first_row};
    const RunsOfKeys runs{machine, all, source, its.rows, its.num_keys};
    // Runs add up in another order than tiles, so not where a row's bits may not depend on its neighbours.
    const bool by_size = machine.form == ProductForm::kBySize;
    if (by_size && range.fused && its.rows <= all.shape.words.group_rows &&
        runs.shared_floats() <= machine.shared_floats) {
      return runs.attend();
    }
    const TileSizes tiles = tile_sizes(machine, dims, Path::kStandard, its.rows, its.num_keys, range.fused);
    SharedParts parts{machine.shared};
    attend_sequence(machine, all, source, tiles, parts, its, range.fused);
  });
}

}  // namespace kvfold
