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
  int64_t tiles_of_group, query, state, weighted, keys, values, scores, words, shares, scales;

  explicit Parts(const MlaDims& dims) {
    const int64_t columns = whole_steps(dims.kv_lora);
    tiles_of_group = std::min(kMostTiles, ceil_div(dims.heads, kHeadLanes));
    query = whole_steps(dims.latent()) / kLatentStep * kMostRecordWords * kHeadLanes;
    state = sizeof(LatentState) / 4;
    weighted = columns * kHeadLanes;
    keys = kPageTokens * key_stride(dims) / 2;
    values = columns * kPagePairs;
    scores = kPageTokens * kHeadLanes;
    words = kPagePairs * kHeadLanes;
    shares = ceil_div(dims.kv_lora / kQ8Block, kShareBlocks) * kShareBlocks * kPagePairs;
    scales = ceil_div(dims.latent() / kQ8Block, kScaleBlocks) * kScaleBlocks * kPageTokens;
  }
  static int64_t key_stride(const MlaDims& dims) { return whole_steps(dims.latent()); }
  int64_t partial() const { return state + weighted; }  // of a tile
  // What a page becomes; what pages of codes become, of the group's tiles and of themselves.
  int64_t tile() const { return keys + values + scores + words; }
  int64_t code_tile() const { return kPagesAtOnce * (scores + words + 2 * kHeadLanes); }
  int64_t code_page() const { return scales + shares + shares / kPagePairs; }
  int64_t codes() const { return tiles_of_group * code_tile() + kPagesAtOnce * code_page(); }
  // Queries and three softmaxes of a group's tiles, and what pages become.
  int64_t total() const { return tiles_of_group * (query + 3 * partial()) + std::max(tile(), codes()); }
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

  // A member's scratch: queries, softmaxes of a run, a stretch and the row, what a page becomes.
  struct Memory {
    uint32_t* query;
    float *run, *stretch, *row, *tile;
  };
  Memory memory(int member) const {
    float* base = machine.of(member);
    float* run = base + parts.tiles_of_group * parts.query;
    return {reinterpret_cast<uint32_t*>(base), run, run + group_partial(), run + 2 * group_partial(),
            run + 3 * group_partial()};
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

  const uint8_t* cached(int64_t i, int64_t key) const {
    return cache.row(layer, rows.page(i, key) * kPageTokens);
  }

  // Up to kPageTokens keys as rows of bfloat16, and what becomes of them in a member's memory. Not of codes.
  struct Page {
    const uint16_t* rows;
    int64_t stride, keys;
    uint32_t *values, *words;
    float* scores;
  };
  Page page(int64_t i, int64_t key, int64_t keys, float* tile) const {
    const uint8_t* raw = cached(i, key);
    float* scores = tile + parts.keys + parts.values;
    Page page{reinterpret_cast<const uint16_t*>(raw),
              dims.latent(),
              keys,
              reinterpret_cast<uint32_t*>(tile + parts.keys),
              reinterpret_cast<uint32_t*>(scores + parts.scores),
              scores};
    if (cache.type == CacheType::kBF16 && dims.latent() % kLatentStep == 0 &&
        dims.kv_lora % kLatentStep == 0) {
      return page;
    }
    auto* widened = reinterpret_cast<uint16_t*>(tile);
    page.rows = widened;
    page.stride = Parts::key_stride(dims);
    kernels.widen(cache.type, raw, cache.row_bytes(), keys, dims.latent(), widened, page.stride);
    return page;
  }
  void score(const Page& page, const uint32_t* query, float* scores) const {
    kernels.score_pairs(query, whole_steps(dims.latent()) / 2, page.rows, page.stride, page.keys, scores);
  }
  void make_values(const Page& page) const {
    kernels.pair_values(page.rows, page.stride, page.keys, columns(), page.values);
  }
  // Weights of a page's scores times its values into the softmax at `partial`, which has met the scores.
  void add(const Page& page, const float* scores, float* partial, int64_t tile) const {
    kernels.weigh(scores, page.keys, scale_log2e, state(partial, tile), page.words);
    kernels.add_values(page.words, page.keys, page.values, columns(), weighted(partial, tile));
  }

  // Pages of codes, and what their scores become in a member's memory: a tile's of all pages side by side.
  struct CodePages {
    CodePage pages[kPagesAtOnce];
    int64_t num_pages = 0;
  };
  struct CodeTile {
    float *scores, *exponents, *factors;
    uint32_t* words;
    float* scores_of(int64_t n) const { return scores + n * kPageTokens * kHeadLanes; }
  };
  CodePage& add_page(CodePages& all, int64_t i, int64_t key, int64_t keys, float* memory) const {
    float* at = memory + parts.tiles_of_group * parts.code_tile() + all.num_pages * parts.code_page();
    CodePage& page = all.pages[all.num_pages++];
    auto* shares = reinterpret_cast<uint32_t*>(at + parts.scales);
    page = {cached(i, key), keys, at, shares, at + parts.scales + parts.shares, nullptr, 0};
    kernels.read_scales(page, cache.row_bytes(), dims.latent() / kQ8Block, dims.kv_lora);
    return page;
  }
  CodeTile code_tile(int64_t tile, float* memory) const {
    float* scores = memory + tile * parts.code_tile();
    float* exponents = scores + kPagesAtOnce * parts.scores;
    float* factors = exponents + kPagesAtOnce * kHeadLanes;
    return {scores, exponents, factors, reinterpret_cast<uint32_t*>(factors + kPagesAtOnce * kHeadLanes)};
  }
  void score_codes(const uint32_t* query, CodePage& page, float* scores) const {
    kernels.score_codes(query, dims.latent() / kQ8Block, page, cache.row_bytes(), scores);
  }
  // Weights of pages into the softmax at `partial`. scores(tile, n): those of page n, which the softmax has
  // met.
  template <class Scores>
  void add(CodePages& all, int64_t first_tile, int64_t num_tiles, const Scores& scores, bool are_first,
           float* partial, float* memory) const {
    CodeSums sums[kMostTiles];
    for (int64_t tile = 0; tile < num_tiles; tile++) {
      const CodeTile made = code_tile(tile, memory);
      for (int64_t n = 0; n < all.num_pages; n++) {
        kernels.weigh_codes(scores(tile, n), all.pages[n].keys, scale_log2e, made.exponents + n * kHeadLanes,
                            state(partial, first_tile + tile), made.words + n * parts.words,
                            made.factors + n * kHeadLanes);
      }
      sums[tile] = {made.words, made.factors, weighted(partial, first_tile + tile)};
    }
    kernels.add_codes(all.pages, all.num_pages, cache.row_bytes(), sums, num_tiles, dims.kv_lora, are_first);
  }

  // Keys of a run into the softmax at `partial`.
  void attend_run(int64_t i, int64_t group, int64_t run, int64_t next_run, float* partial,
                  const Memory& m) const {
    if (in_codes()) return attend_codes(i, group, run, next_run, partial, m);
    start(partial, tiles(group), all_columns());
    alignas(64) float exponents[kHeadLanes];
    rows.for_pages(i, run, [&](int64_t key, int64_t keys) {
      const Page latents = page(i, key, keys, m.tile);
      make_values(latents);
      for (int64_t tile = 0; tile < tiles(group); tile++) {
        score(latents, m.query + tile * parts.query, latents.scores);
        kernels.exponents(latents.scores, keys, scale_log2e, exponents);
        kernels.raise(exponents, state(partial, tile), weighted(partial, tile), columns());
        add(latents, latents.scores, partial, tile);
      }
    });
  }
  void attend_codes(int64_t i, int64_t group, int64_t run, int64_t next_run, float* partial,
                    const Memory& m) const {
    const int64_t num_tiles = tiles(group), last = std::min(rows.visible(i), (run + 1) * rows.run_keys(i));
    bool are_first = true;
    const auto attend = [&](int64_t first, int64_t keys_at_once) {
      CodePages all;
      for_blocks(first, first + keys_at_once, [&](int64_t key, int64_t keys) {
        const int64_t n = all.num_pages;
        CodePage& page = add_page(all, i, key, keys, m.tile);
        // As far behind the next pages, or those that the next run begins with, as this one is.
        int64_t next = key + kPagesAtOnce * kPageTokens;
        if (next >= last) next = next_run * rows.run_keys(i) + n * kPageTokens;
        if (next < rows.visible(i)) {
          page.next = cached(i, next);
          page.next_lines =
              ceil_div(std::min(kPageTokens, rows.visible(i) - next) * cache.row_bytes(), kLineBytes);
        }
        for (int64_t tile = 0; tile < num_tiles; tile++) {
          const CodeTile made = code_tile(tile, m.tile);
          score_codes(m.query + tile * parts.query, page, made.scores_of(n));
          kernels.exponents(made.scores_of(n), keys, scale_log2e, made.exponents + n * kHeadLanes);
        }
      });
      for (int64_t tile = 0; tile < num_tiles; tile++) {
        meet(code_tile(tile, m.tile).exponents, all.num_pages, are_first, partial, tile);
      }
      const auto scores = [&](int64_t tile, int64_t n) { return code_tile(tile, m.tile).scores_of(n); };
      add(all, 0, num_tiles, scores, are_first, partial, m.tile);
      are_first = false;
    };
    rows.for_pages(i, run, attend, kPagesAtOnce * kPageTokens);
  }
  // The state's exponents to no less than those of pages; of the first ones it has no sums yet.
  void meet(const float* exponents, int64_t num_pages, bool are_first, float* partial, int64_t tile) const {
    alignas(64) float most[kHeadLanes];
    std::copy_n(exponents, kHeadLanes, most);
    for (int64_t n = 1; n < num_pages; n++) {
      for (int64_t head = 0; head < kHeadLanes; head++) {
        most[head] = std::max(most[head], exponents[n * kHeadLanes + head]);
      }
    }
    LatentState& s = *state(partial, tile);
    if (!are_first) return kernels.raise(most, &s, weighted(partial, tile), columns());
    std::copy_n(most, kHeadLanes, s.exponent);
    std::fill_n(s.sum, kHeadLanes, 0.0f);
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

  // Joins columns of the runs of a row: AbsorbedRows::for_runs.
  template <class End, class Next>
  void join_runs(int64_t i, int64_t group, Columns c, const Memory& m, const End& end_of_first,
                 const Next& next) const {
    const int64_t count = tiles(group);
    start(m.row, count, c);
    rows.for_stretches(i, [&](int64_t first, int64_t last) {
      float* joined = next(first);
      if (int64_t run = end_of_first(first); run < last) {
        start(m.stretch, count, c);
        merge(joined, m.stretch, count, c);
        for (joined = m.stretch; run < last; run++) merge(next(run), joined, count, c);
      }
      merge(joined, m.row, count, c);
    });
    finish(i, group, m.row, c);
  }

  // fa=0: all scores of a tile [keys][kHeadLanes], then their softmax in a second pass.
  void attend_stored(int64_t i, int64_t tile, float* scores, const Memory& m) const {
    const int64_t keys_of_row = rows.visible(i);
    const uint32_t* query = m.query + tile * parts.query;
    for_blocks(0, keys_of_row, [&](int64_t key, int64_t keys) {
      float* to = scores + key * kHeadLanes;
      if (in_codes()) {
        CodePages one;
        score_codes(query, add_page(one, i, key, keys, m.tile), to);
      } else {
        score(page(i, key, keys, m.tile), query, to);
      }
    });
    alignas(64) float exponents[kHeadLanes];
    kernels.exponents(scores, keys_of_row, scale_log2e, exponents);
    kernels.raise(exponents, state(m.row, tile), weighted(m.row, tile), columns());
    for_blocks(0, keys_of_row, [&](int64_t key, int64_t keys) {
      const float* from = scores + key * kHeadLanes;
      if (in_codes()) {
        CodePages one;
        add_page(one, i, key, keys, m.tile);
        kernels.exponents(from, keys, scale_log2e, code_tile(0, m.tile).exponents);
        return add(one, tile, 1, [&](int64_t, int64_t) { return from; }, false, m.row, m.tile);
      }
      const Page latents = page(i, key, keys, m.tile);
      make_values(latents);
      add(latents, from, m.row, tile);
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
    const StoringMembers storing(machine, rows.most_visible() * kHeadLanes);
    storing.for_each(rows.num_rows * groups, [&](int64_t unit, float* scores, int member) {
      const int64_t i = unit / groups, group = unit % groups;
      const auto memory = op.memory(member);
      op.pack(i, group, memory.query);
      op.start(memory.row, op.tiles(group), op.all_columns());
      for (int64_t tile = 0; tile < op.tiles(group); tile++) {
        op.attend_stored(i, tile, scores, memory);
      }
      op.finish(i, group, memory.row, op.all_columns());
    });
    return;
  }
  rows.for_runs(
      machine, groups, op.group_partial(), op.join_parts(), [&](int member) { return op.memory(member).run; },
      [&](int64_t i, int64_t group, int member) { op.pack(i, group, op.memory(member).query); },
      [&](int64_t i, int64_t group, int64_t run, int64_t next_run, float* partial, int member) {
        op.attend_run(i, group, run, next_run, partial, op.memory(member));
      },
      [&](int64_t group, float* from, float* into) {
        op.merge(from, into, op.tiles(group), op.all_columns());
      },
      [&](int64_t i, int64_t group, int64_t part, int64_t parts, int member, const auto& end_of_first,
          const auto& next) {
        op.join_runs(i, group, parts == 1 ? op.all_columns() : op.join_part(part), op.memory(member),
                     end_of_first, next);
      });
}

}  // namespace kvfold
