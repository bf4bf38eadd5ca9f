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

// Columns of a row's runs that a member joins: those of V2-Lite's 16 heads are work for four threads.
constexpr int64_t kJoinColumns = 128;

int64_t whole_steps(int64_t n) { return ceil_div(n, kLatentStep) * kLatentStep; }

// Floats of each part of a member's scratch, whole lines.
struct Parts {
  int64_t tiles_of_group, query, state, weighted, keys, values, shares, scores, words;

  explicit Parts(const MlaDims& dims) {
    const int64_t columns = whole_steps(dims.kv_lora);
    tiles_of_group = std::min(kMostTiles, ceil_div(dims.heads, kHeadLanes));
    // Pairs take half a word a number; codes of a q8_0 cache 9 words for 32.
    query = whole_steps(dims.latent()) / 2 * kHeadLanes;
    state = sizeof(LatentState) / 4;
    weighted = columns * kHeadLanes;
    keys = kPageTokens * key_stride(dims) / 2;
    values = columns * kPagePairs;
    shares = ceil_div(dims.kv_lora / kQ8Block, kShareBlocks) * kShareBlocks * (kPagePairs + 1);
    scores = kPageTokens * kHeadLanes;
    words = kPagePairs * kHeadLanes;
  }
  static int64_t key_stride(const MlaDims& dims) { return whole_steps(dims.latent()); }
  int64_t partial() const { return state + weighted; }  // of a tile
  int64_t tile() const { return keys + values + shares + scores + words; }
  // Queries and two softmaxes of a group's tiles, and what a page becomes.
  int64_t total() const { return tiles_of_group * (query + 2 * partial()) + tile(); }
};

struct RoundedLatentOp {
  const Machine& machine;
  const AbsorbedRows& rows;
  const MlaDims& dims;
  float scale_log2e;
  const CacheArray& cache;
  int64_t layer;
  Matrix q, out;
  LatentKernels kernels;
  Parts parts;

  int64_t columns() const { return whole_steps(dims.kv_lora); }
  bool in_codes() const { return cache.type == CacheType::kQ8_0; }
  int64_t groups() const { return ceil_div(dims.heads, parts.tiles_of_group * kHeadLanes); }
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

  // Weighted columns that a member looks after, whole steps.
  struct Columns {
    int64_t first, count;
  };
  Columns all_columns() const { return {0, columns()}; }
  int64_t join_parts() const { return ceil_div(columns(), kJoinColumns); }
  Columns join_part(int64_t part) const {
    const int64_t first = part * kJoinColumns;
    return {first, std::min(kJoinColumns, columns() - first)};
  }

  void start(float* partial, int64_t count, Columns c) const {
    for (int64_t tile = 0; tile < count; tile++) {
      LatentState& s = *state(partial, tile);
      std::fill_n(s.exponent, kHeadLanes, -std::numeric_limits<float>::infinity());
      std::fill_n(s.sum, kHeadLanes, 0.0f);
      std::fill_n(weighted(partial, tile) + c.first * kHeadLanes, c.count * kHeadLanes, 0.0f);
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

  // What up to kPageTokens keys are in a member's memory.
  struct Page {
    const uint8_t* raw;
    const uint16_t* rows;  // unless in codes
    int64_t stride;
    int64_t keys;
    CodeValues values;  // codes: words of bfloat16, unless in codes
  };
  Page page(int64_t i, int64_t key, int64_t keys, float* tile) const {
    const uint8_t* raw = cache.row(layer, rows.page(i, key) * kPageTokens);
    auto* words = reinterpret_cast<uint32_t*>(tile + parts.keys);
    float* largest = tile + parts.keys + parts.values + parts.shares / (kPagePairs + 1) * kPagePairs;
    Page page{raw, nullptr, 0, keys, {words, words + parts.values, largest}};
    if (in_codes()) return page;
    if (cache.type == CacheType::kBF16 && dims.latent() % kLatentStep == 0 &&
        dims.kv_lora % kLatentStep == 0) {
      page.rows = reinterpret_cast<const uint16_t*>(raw);
      page.stride = dims.latent();
      return page;
    }
    auto* widened = reinterpret_cast<uint16_t*>(tile);
    page.rows = widened;
    page.stride = Parts::key_stride(dims);
    kernels.widen(cache.type, raw, cache.row_bytes(), keys, dims.latent(), widened, page.stride);
    return page;
  }
  void score(const Page& page, const uint32_t* query, float* scores) const {
    if (in_codes()) {
      kernels.score_codes(query, dims.latent() / kQ8Block, page.raw, cache.row_bytes(), page.keys, scores);
    } else {
      kernels.score_pairs(query, whole_steps(dims.latent()) / 2, page.rows, page.stride, page.keys, scores);
    }
  }
  void make_values(const Page& page) const {
    if (in_codes()) {
      kernels.pair_codes(page.raw, cache.row_bytes(), page.keys, dims.kv_lora, page.values);
    } else {
      kernels.pair_values(page.rows, page.stride, page.keys, columns(), page.values.codes);
    }
  }
  float* scores_of(float* tile) const { return tile + parts.keys + parts.values + parts.shares; }

  // Weights of a page's scores times its values into the softmax at `partial`. exponents: of the page's
  // scores, which the softmax has met.
  void add(const Page& page, const float* scores, const float* exponents, float* partial, int64_t tile,
           uint32_t* words) const {
    LatentState* s = state(partial, tile);
    float* into = weighted(partial, tile);
    if (!in_codes()) {
      kernels.weigh(scores, page.keys, scale_log2e, s, words);
      kernels.add_values(words, page.keys, page.values.codes, columns(), into);
      return;
    }
    alignas(64) float factors[kHeadLanes];
    kernels.weigh_codes(scores, page.keys, scale_log2e, exponents, s, words, factors);
    kernels.add_codes(words, factors, page.keys, page.values, dims.kv_lora, into);
  }

  // Keys of a run into the softmax at `partial`.
  void attend_run(int64_t i, int64_t group, int64_t run, float* partial, const Memory& m) const {
    start(partial, tiles(group), all_columns());
    float* scores = scores_of(m.tile);
    auto* words = reinterpret_cast<uint32_t*>(scores + parts.scores);
    alignas(64) float exponents[kHeadLanes];
    rows.for_pages(i, run, [&](int64_t key, int64_t keys) {
      const Page latents = page(i, key, keys, m.tile);
      make_values(latents);
      for (int64_t tile = 0; tile < tiles(group); tile++) {
        score(latents, m.query + tile * parts.query, scores);
        kernels.exponents(scores, keys, scale_log2e, exponents);
        kernels.raise(exponents, state(partial, tile), weighted(partial, tile), columns());
        add(latents, scores, exponents, partial, tile, words);
      }
    });
  }

  void merge(float* from, float* into, int64_t count, Columns c) const {
    const int64_t at = c.first * kHeadLanes;
    for (int64_t tile = 0; tile < count; tile++) {
      kernels.merge(*state(from, tile), weighted(from, tile) + at, state(into, tile),
                    weighted(into, tile) + at, c.count);
    }
  }

  void finish(int64_t i, int64_t group, float* partial, Columns c) const {
    for (int64_t tile = 0; tile < tiles(group); tile++) {
      const int64_t head = first_head(group, tile), heads = std::min(kHeadLanes, dims.heads - head);
      kernels.divide(*state(partial, tile), weighted(partial, tile) + c.first * kHeadLanes, heads,
                     std::min(c.count, dims.kv_lora - c.first), out.row(i) + head * dims.kv_lora + c.first,
                     dims.kv_lora);
    }
  }

  // Joins columns of the runs of a row in order. next(run): where their softmaxes are.
  template <class Next>
  void join_runs(int64_t i, int64_t group, Columns c, const Memory& m, const Next& next) const {
    start(m.row, tiles(group), c);
    for (int64_t run = 0; run < rows.num_runs(i); run++) merge(next(run), m.row, tiles(group), c);
    finish(i, group, m.row, c);
  }

  // fa=0: all scores of a tile [keys][kHeadLanes], then their softmax in a second pass.
  void attend_stored(int64_t i, int64_t tile, float* scores, const Memory& m) const {
    const int64_t keys_of_row = rows.visible(i);
    for_blocks(0, keys_of_row, [&](int64_t key, int64_t keys) {
      score(page(i, key, keys, m.tile), m.query + tile * parts.query, scores + key * kHeadLanes);
    });
    alignas(64) float exponents[kHeadLanes];
    kernels.exponents(scores, keys_of_row, scale_log2e, exponents);
    kernels.raise(exponents, state(m.row, tile), weighted(m.row, tile), columns());
    auto* words = reinterpret_cast<uint32_t*>(scores_of(m.tile));
    for_blocks(0, keys_of_row, [&](int64_t key, int64_t keys) {
      const Page latents = page(i, key, keys, m.tile);
      make_values(latents);
      if (in_codes()) kernels.exponents(scores + key * kHeadLanes, keys, scale_log2e, exponents);
      add(latents, scores + key * kHeadLanes, exponents, m.row, tile, words);
    });
  }
};

}  // namespace

int64_t attend_latent_rounded_floats(const MlaDims& dims) { return Parts(dims).total(); }

void attend_latent_rounded(const Machine& machine, const AbsorbedRows& rows, bool fused, const MlaDims& dims,
                           float scale, const CacheArray& cache, int64_t layer, Matrix q, Matrix out) {
  const RoundedLatentOp op{machine,       rows,       dims, static_cast<float>(scale * 1.4426950408889634),
                           cache,         layer,      q,    out,
                           *isa().latent, Parts(dims)};
  const int64_t groups = op.groups();
  if (!fused) {
    machine.team.for_each(rows.num_rows * groups, [&](int64_t unit, int member) {
      const int64_t i = unit / groups, group = unit % groups;
      const auto memory = op.memory(member);
      op.pack(i, group, memory.query);
      op.start(memory.row, op.tiles(group), op.all_columns());
      for (int64_t tile = 0; tile < op.tiles(group); tile++) {
        op.attend_stored(i, tile, machine.shared + member * stored_floats(machine), memory);
      }
      op.finish(i, group, memory.row, op.all_columns());
    });
    return;
  }
  rows.for_runs(
      machine, groups, op.group_partial(), op.join_parts(), [&](int member) { return op.memory(member).run; },
      [&](int64_t i, int64_t group, int member) { op.pack(i, group, op.memory(member).query); },
      [&](int64_t i, int64_t group, int64_t run, float* partial, int member) {
        op.attend_run(i, group, run, partial, op.memory(member));
      },
      [&](int64_t i, int64_t group, int64_t part, int64_t parts, int member, const auto& next) {
        op.join_runs(i, group, parts == 1 ? op.all_columns() : op.join_part(part), op.memory(member), next);
      });
}

}  // namespace kvfold
