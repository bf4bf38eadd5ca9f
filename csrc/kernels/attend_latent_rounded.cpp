#include "kernels/attend_latent_rounded.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "kernels/attention_tiles.h"
#include "kernels/latent_kernels.h"

namespace kvfold {
namespace {

// Tiles of heads that share the keys and values made of a page: what these cost is then a quarter for models
// of 64 heads and more, and the sums of four tiles stay in the second-level cache (512 columns: 128 KiB).
constexpr int64_t kMostTiles = 4;

int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

// Floats of each part of a member's scratch, whole lines.
struct Parts {
  int64_t tiles_of_group, query, state, weighted, keys, values, scores, words;

  explicit Parts(const MlaDims& dims) {
    const int64_t columns = ceil_div(dims.kv_lora, kValueColumns) * kValueColumns;
    tiles_of_group = std::min(kMostTiles, ceil_div(dims.heads, kHeadLanes));
    // Pairs take half a word a number; codes of a q8_0 cache 9 words for 32.
    query = whole_lines(pairs_of(dims.latent()) * kHeadLanes);
    state = sizeof(LatentState) / 4;
    weighted = columns * kHeadLanes;
    keys = whole_lines((kPageTokens * key_stride(dims) + kValueColumns) / 2 + 1);  // blocks are read whole
    values = columns * kPagePairs;
    scores = kPageTokens * kHeadLanes;
    words = kPagePairs * kHeadLanes;
  }
  static int64_t key_stride(const MlaDims& dims) { return 2 * pairs_of(dims.latent()); }
  int64_t partial() const { return state + weighted; }  // of a tile
  int64_t tile() const { return keys + values + scores + words; }
  // Queries and two softmaxes of a group's tiles, and what a page becomes.
  int64_t total() const { return tiles_of_group * (query + 2 * partial()) + tile(); }
};

struct RoundedLatentOp {
  const Machine& machine;
  const Step& step;
  const MlaDims& dims;
  float scale_log2e;
  const CacheArray& cache;
  int64_t layer;
  Matrix q, out;
  int64_t first_row;  // of the range: where q and out start
  LatentKernels kernels;
  Parts parts;

  int64_t columns() const { return ceil_div(dims.kv_lora, kValueColumns) * kValueColumns; }
  bool in_codes() const { return cache.type == CacheType::kQ8_0; }
  int64_t groups() const { return ceil_div(dims.heads, parts.tiles_of_group * kHeadLanes); }
  int64_t visible(int64_t i) const { return step.visible[first_row + i]; }
  int64_t num_runs(int64_t i) const { return ceil_div(visible(i), run_keys(visible(i))); }
  int64_t first_head(int64_t group, int64_t tile) const {
    return (group * parts.tiles_of_group + tile) * kHeadLanes;
  }
  int64_t tiles(int64_t group) const {
    return std::min(parts.tiles_of_group, ceil_div(dims.heads - first_head(group, 0), kHeadLanes));
  }
  int64_t group_partial() const { return parts.tiles_of_group * parts.partial(); }

  // A member's scratch: queries, softmax of a run, that of the row, what a page becomes.
  struct Memory {
    uint32_t* query;
    float *run, *row, *tile;
  };
  Memory memory(int member) const {
    float* base = machine.of(member);
    float* run = base + parts.tiles_of_group * parts.query;
    return {reinterpret_cast<uint32_t*>(base), run, run + group_partial(), run + 2 * group_partial()};
  }
  LatentState* state(float* partial, int64_t tile) const {
    return reinterpret_cast<LatentState*>(partial + tile * parts.partial());
  }
  float* weighted(float* partial, int64_t tile) const {
    return partial + tile * parts.partial() + parts.state;
  }

  void start(float* partial, int64_t count) const {
    for (int64_t tile = 0; tile < count; tile++) {
      LatentState& s = *state(partial, tile);
      std::fill_n(s.exponent, kHeadLanes, -std::numeric_limits<float>::infinity());
      std::fill_n(s.sum, kHeadLanes, 0.0f);
      std::memset(weighted(partial, tile), 0, parts.weighted * 4);
    }
  }

  void pack(int64_t i, int64_t group, uint32_t* query) const {
    for (int64_t tile = 0; tile < tiles(group); tile++, query += parts.query) {
      const int64_t head = first_head(group, tile), heads = std::min(kHeadLanes, dims.heads - head);
      const float* from = q.row(i) + head * dims.latent();
      const auto pack = in_codes() ? kernels.pack_codes : kernels.pack_pairs;
      pack(from, dims.latent(), heads, dims.latent(), query);
    }
  }

  // A page of up to kPageTokens keys. score(): of each of a group's tiles; values as words.
  struct Page {
    const uint8_t* raw;
    const uint16_t* rows;  // unless in codes
    int64_t stride;
    int64_t keys;
  };
  Page page(int64_t i, int64_t key, int64_t keys, float* tile) const {
    const int32_t index = step.page_list(step.sequence_of[first_row + i])[key / kPageTokens];
    const uint8_t* raw = cache.row(layer, index * kPageTokens);
    const int64_t stride = Parts::key_stride(dims);
    if (in_codes()) return {raw, nullptr, 0, keys};
    if (cache.type == CacheType::kBF16 && dims.latent() % 2 == 0 && dims.kv_lora % kValueColumns == 0) {
      return {raw, reinterpret_cast<const uint16_t*>(raw), dims.latent(), keys};
    }
    auto* rows = reinterpret_cast<uint16_t*>(tile);
    kernels.widen(cache.type, raw, cache.row_bytes(), keys, dims.latent(), rows, stride);
    return {raw, rows, stride, keys};
  }
  void score(const Page& page, const uint32_t* query, float* scores) const {
    if (in_codes()) {
      kernels.score_codes(query, dims.latent() / kQ8Block, page.raw, cache.row_bytes(), page.keys, scores);
    } else {
      kernels.score_pairs(query, pairs_of(dims.latent()), page.rows, page.stride, page.keys, scores);
    }
  }
  uint32_t* values(const Page& page, float* tile) const {
    auto* words = reinterpret_cast<uint32_t*>(tile + parts.keys);
    if (in_codes()) {
      kernels.pair_codes(page.raw, cache.row_bytes(), page.keys, dims.kv_lora, words);
    } else {
      kernels.pair_values(page.rows, page.stride, page.keys, columns(), words);
    }
    return words;
  }

  // Keys of a run into the softmax at `partial`.
  void attend_run(int64_t i, int64_t group, int64_t run, float* partial, const Memory& m) const {
    start(partial, tiles(group));
    const int64_t first = run * run_keys(visible(i)),
                  last = std::min(visible(i), first + run_keys(visible(i)));
    float* scores = m.tile + parts.keys + parts.values;
    auto* words = reinterpret_cast<uint32_t*>(scores + parts.scores);
    for_blocks(first, last, [&](int64_t key, int64_t keys) {
      const Page latents = page(i, key, keys, m.tile);
      const uint32_t* value_words = values(latents, m.tile);
      for (int64_t tile = 0; tile < tiles(group); tile++) {
        LatentState* s = state(partial, tile);
        score(latents, m.query + tile * parts.query, scores);
        kernels.raise(scores, keys, scale_log2e, s, weighted(partial, tile), columns());
        kernels.weigh(scores, keys, scale_log2e, s, words);
        kernels.add_values(words, keys, value_words, columns(), weighted(partial, tile));
      }
    });
  }

  void merge(float* from, float* into, int64_t count) const {
    for (int64_t tile = 0; tile < count; tile++) {
      kernels.merge(*state(from, tile), weighted(from, tile), state(into, tile), weighted(into, tile),
                    columns());
    }
  }

  void finish(int64_t i, int64_t group, float* partial) const {
    for (int64_t tile = 0; tile < tiles(group); tile++) {
      const int64_t head = first_head(group, tile), heads = std::min(kHeadLanes, dims.heads - head);
      const LatentState& s = *state(partial, tile);
      const float* from = weighted(partial, tile);
      for (int64_t lane = 0; lane < heads; lane++) {
        float* to = out.row(i) + (head + lane) * dims.kv_lora;
        const float sum = s.sum[lane];
        for (int64_t c = 0; c < dims.kv_lora; c++) to[c] = from[c * kHeadLanes + lane] / sum;
      }
    }
  }

  // fa=0: all scores of a tile [keys][kHeadLanes], then their softmax in a second pass.
  void attend_stored(int64_t i, int64_t tile, float* scores, const Memory& m) const {
    const int64_t keys_of_row = visible(i);
    LatentState* s = state(m.row, tile);
    for_blocks(0, keys_of_row, [&](int64_t key, int64_t keys) {
      score(page(i, key, keys, m.tile), m.query + tile * parts.query, scores + key * kHeadLanes);
    });
    kernels.raise(scores, keys_of_row, scale_log2e, s, weighted(m.row, tile), columns());
    auto* words = reinterpret_cast<uint32_t*>(m.tile + parts.keys + parts.values);
    for_blocks(0, keys_of_row, [&](int64_t key, int64_t keys) {
      kernels.weigh(scores + key * kHeadLanes, keys, scale_log2e, s, words);
      const Page latents = page(i, key, keys, m.tile);
      kernels.add_values(words, keys, values(latents, m.tile), columns(), weighted(m.row, tile));
    });
  }
};

}  // namespace

int64_t attend_latent_rounded_floats(const MlaDims& dims) { return Parts(dims).total(); }

void attend_latent_rounded(const Machine& machine, const Step& step, const MlaDims& dims, float scale,
                           const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const int64_t rows = range.num_rows();
  const RoundedLatentOp op{
      machine,         step,          dims,       static_cast<float>(scale * 1.4426950408889634),
      cache,           layer,         q,          out,
      range.first_row, *isa().latent, Parts(dims)};
  const int64_t groups = op.groups();
  int64_t runs = 0;
  for (int64_t i = 0; i < rows; i++) runs = std::max(runs, op.num_runs(i));

  if (!range.fused) {
    machine.team.for_each(rows * groups, [&](int64_t unit, int member) {
      const int64_t i = unit / groups, group = unit % groups;
      const auto memory = op.memory(member);
      op.pack(i, group, memory.query);
      op.start(memory.row, op.tiles(group));
      for (int64_t tile = 0; tile < op.tiles(group); tile++) {
        op.attend_stored(i, tile, machine.shared + member * stored_floats(machine), memory);
      }
      op.finish(i, group, memory.row);
    });
    return;
  }

  // Enough rows for every member: each goes through the runs of its row by itself.
  const int64_t row_partials = runs * groups * op.group_partial();
  const int64_t window = machine.shared_floats / row_partials;
  if (runs == 1 || rows * groups >= 8 * machine.team.size() || window == 0) {
    machine.team.for_each(rows * groups, [&](int64_t unit, int member) {
      const int64_t i = unit / groups, group = unit % groups;
      const auto memory = op.memory(member);
      op.pack(i, group, memory.query);
      op.start(memory.row, op.tiles(group));
      for (int64_t run = 0; run < op.num_runs(i); run++) {
        op.attend_run(i, group, run, memory.run, memory);
        op.merge(memory.run, memory.row, op.tiles(group));
      }
      op.finish(i, group, memory.row);
    });
    return;
  }

  // Few rows: the runs are spread over members, and then joined.
  for (int64_t first = 0; first < rows; first += window) {
    const int64_t n = std::min(window, rows - first);
    const auto partial = [&](int64_t i, int64_t group, int64_t run) {
      return machine.shared + (((i - first) * groups + group) * runs + run) * op.group_partial();
    };
    machine.team.for_each(n * groups * runs, [&](int64_t unit, int member) {
      const int64_t i = first + unit / (groups * runs), group = unit / runs % groups, run = unit % runs;
      if (run >= op.num_runs(i)) return;
      const auto memory = op.memory(member);
      op.pack(i, group, memory.query);
      op.attend_run(i, group, run, partial(i, group, run), memory);
    });
    machine.team.for_each(n * groups, [&](int64_t unit, int member) {
      const int64_t i = first + unit / groups, group = unit % groups;
      const auto memory = op.memory(member);
      op.start(memory.row, op.tiles(group));
      for (int64_t run = 0; run < op.num_runs(i); run++) {
        op.merge(partial(i, group, run), memory.row, op.tiles(group));
      }
      op.finish(i, group, memory.row);
    });
  }
}

}  // namespace kvfold
