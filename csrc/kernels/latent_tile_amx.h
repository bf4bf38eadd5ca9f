// The products of latent_kernels.h on matrix tiles; what is between them is latent_tile.h's. Included last by
// isa/latent_amx.cpp.
//
// Scores are cached rows as they lie in memory, 16 keys a tile, times queries; their layouts are those of
// latent_kernels.h. Then weights are turned to rows of heads and meet columns of values:
//
//   weights   [steps of 32 keys][kHeadLanes][16]             words of two bfloat16
//             or, for a q8_0 cache, [kHeadLanes][32]         words of two int16: all keys of a page
//   values    [columns / 16][pairs of keys of a page][16]    words of two bfloat16
//             or, 32 columns at a time, [2][quads of keys][16] words of four codes, quads in the order of
//             quad_key
//   shares    [blocks][32]                                   words of two int16: all keys of a page
//   weighted  [columns / 16][kHeadLanes][16]                 float32
//
// An int16 weight meets codes as two unsigned bytes, in two products.
#pragma once

#include <utility>

#include "kernels/latent_tile.h"

// So that what is done mostly lies in one piece.
#define KVFOLD_MOSTLY(what) __builtin_expect(what, 1)
// For those that are handed an array that has to stay in registers.
#define KVFOLD_INLINE_LATENT inline __attribute__((always_inline))

namespace kvfold {
namespace {

template <class S>
struct LatentTileAmx : LatentTile<typename S::Vectors> {
  using V = typename S::Vectors;
  using Vectors = LatentTile<V>;
  using Floats = typename S::Floats;
  static constexpr int64_t kRows = S::kTileRows, kWords = S::kTileWords, kTile = kRows * kWords;
  static_assert(kRows == kHeadLanes && kWords == kHeadLanes && kWords == kValueColumns &&
                V::kLanes == kWords);
  static constexpr int64_t kTileBytes = 64, kStepKeys = 2 * kWords;
  static constexpr int64_t kKeyTiles = kPageTokens / kRows;

  // use(integral_constant of tiles) for 1 to 4 tiles.
  template <class Use>
  static void use_tiles(int64_t n, const Use& use) {
    Vectors::template use_count<kKeyTiles>(0, n, [&](int64_t, auto count) { use(count); });
  }

  template <int tile, int n>
  static void score_step(const uint16_t* rows, int64_t stride) {
    if constexpr (tile < n) {
      // The last has the rows that are left: a register of its own.
      constexpr int a = tile == n - 1 ? 5 : tile % 2 == 0 ? 4 : 7;
      S::template load_tile<a>(rows + tile * kRows * stride, stride * 2);
      S::template dot_pairs<tile, a, 6>();
      score_step<tile + 1, n>(rows, stride);
    }
  }
  template <int tile, int n>
  static void clear_tiles() {
    if constexpr (tile < n) {
      S::template zero_tile<tile>();
      clear_tiles<tile + 1, n>();
    }
  }
  template <int tile, int n>
  static void store_tiles(float* to) {
    if constexpr (tile < n) {
      S::template store_tile<tile>(to + tile * kTile, kTileBytes);
      store_tiles<tile + 1, n>(to);
    }
  }

  static void score_pairs(const uint32_t* q, int64_t pairs, const uint16_t* rows, int64_t stride,
                          int64_t keys, float* scores) {
    const int64_t tiles = (keys + kRows - 1) / kRows;
    typename S::TileShapes shapes;
    shapes.rows[tiles - 1] = shapes.rows[5] = static_cast<uint8_t>(keys - (tiles - 1) * kRows);
    S::configure(shapes);
    use_tiles(tiles, [&](auto count) {
      constexpr int n = decltype(count)::value;
      clear_tiles<0, n>();
      for (int64_t i = 0; i < pairs; i += kWords) {
        S::template load_tile<6>(q + i * kHeadLanes, kTileBytes);
        score_step<0, n>(rows + 2 * i, stride);
      }
      store_tiles<0, n>(scores);
    });
    S::release();
  }

  // Scores of up to kRows keys over up to kScaleBlocks blocks on top of `scores`. Products take registers in
  // turn: kCodeSums for sums, from 0 on, then kCodeRegs for keys, kCodeRegs for queries. What a product needs
  // is loaded while the one before is multiplied; its sums are stored after those of `kBetween` before were
  // turned to numbers.
  static constexpr int kCodeSums = 2, kCodeRegs = 3, kBetween = 2, kCodeSlots = 4;
  static constexpr int kCodeSteps = 12;  // whole turns of registers and slots
  struct CodeTile {
    const uint32_t* record;
    const uint8_t* rows;
    int64_t row_bytes, num_blocks;
    const float* scales;
  };
  template <int step>
  KVFOLD_INLINE_LATENT static void load_block(const CodeTile& tile, int64_t b) {
    S::template load_tile<kCodeSums + kCodeRegs + step % kCodeRegs>(tile.record + b * Vectors::kRecord,
                                                                    kTileBytes);
    S::template load_tile<kCodeSums + step % kCodeRegs>(tile.rows + b * kQ8Bytes + 2, tile.row_bytes);
  }
  KVFOLD_INLINE_LATENT static void scale_block(const CodeTile& tile, int64_t b,
                                               const int32_t (&sums)[kRows][kWords], Floats (&out)[kRows]) {
    const auto query =
        S::load(reinterpret_cast<const float*>(tile.record + b * Vectors::kRecord + 8 * kHeadLanes));
    KVFOLD_UNROLLED_LATENT for (int j = 0; j < kRows; j++) {
      const auto scale = S::mul(query, S::set(tile.scales[j * kScaleBlocks + b]));
      out[j] = S::fma(S::to_floats(S::load_codes(sums[j])), scale, out[j]);
    }
  }
  template <int step>
  KVFOLD_INLINE_LATENT static void score_steps(const CodeTile& tile, int64_t first, CodePage& page,
                                               int32_t (&sums)[kCodeSlots][kRows][kWords],
                                               Floats (&out)[kRows]) {
    if constexpr (step < kCodeSteps) {
      const int64_t b = first + step, done = b - kBetween;
      constexpr int sum = step % kCodeSums, keys = kCodeSums + step % kCodeRegs;
      const bool is_multiplied = KVFOLD_MOSTLY(b < tile.num_blocks);
      if (KVFOLD_MOSTLY(b + 1 < tile.num_blocks)) load_block<step + 1>(tile, b + 1);
      if (is_multiplied) {
        S::template zero_tile<sum>();
        S::template dot_tiles<sum, keys, keys + kCodeRegs>();
        Vectors::template bring_near<kScoreLines>(page);
      }
      if (KVFOLD_MOSTLY(done >= 0 && done < tile.num_blocks)) {
        scale_block(tile, done, sums[(step + kCodeSlots - kBetween) % kCodeSlots], out);
      }
      if (is_multiplied) S::template store_tile<sum>(sums[step % kCodeSlots]);
      score_steps<step + 1>(tile, first, page, sums, out);
    }
  }
  static void score_code_tile(const CodeTile& tile, CodePage& page, int64_t keys, bool is_first,
                              float* scores) {
    alignas(64) int32_t sums[kCodeSlots][kRows][kWords];
    Floats out[kRows];
    KVFOLD_UNROLLED_LATENT for (int j = 0; j < kRows; j++) {
      out[j] = is_first || j >= keys ? S::zero() : S::load(scores + j * kHeadLanes);
    }
    load_block<0>(tile, 0);
    for (int64_t b = 0; b < tile.num_blocks + kBetween; b += kCodeSteps)
      score_steps<0>(tile, b, page, sums, out);
    KVFOLD_UNROLLED_LATENT for (int j = 0; j < kRows; j++) {
      if (j < keys) S::store(scores + j * kHeadLanes, out[j]);
    }
  }

  static void set_code_shapes(int64_t keys) {
    typename S::TileShapes shapes;
    for (int tile = 0; tile < kCodeSums + 2 * kCodeRegs; tile++) {
      if (tile < kCodeSums + kCodeRegs) shapes.rows[tile] = static_cast<uint8_t>(keys);
      if (tile >= kCodeSums && tile < kCodeSums + kCodeRegs) shapes.row_bytes[tile] = kQ8Block;
      if (tile >= kCodeSums + kCodeRegs) shapes.rows[tile] = kQ8Block / 4;
    }
    S::configure(shapes);
  }

  static void score_codes(const uint32_t* q, int64_t num_blocks, CodePage& page, int64_t row_bytes,
                          float* scores) {
    for (int64_t at = 0; at < num_blocks; at += kScaleBlocks) {
      for (int64_t key = 0; key < page.keys; key += kRows) {
        const int64_t n = std::min(kRows, page.keys - key);
        if (key == 0 || n < kRows) set_code_shapes(n);
        score_code_tile({q + at * Vectors::kRecord, page.rows + key * row_bytes + at * kQ8Bytes, row_bytes,
                         std::min(kScaleBlocks, num_blocks - at), Vectors::scales_of(page, at, key)},
                        page, n, at == 0, scores + key * kHeadLanes);
      }
    }
    S::release();
  }

  static void pair_values(const uint16_t* rows, int64_t stride, int64_t keys, int64_t columns, uint32_t* to) {
    static constexpr uint16_t zeros[kLatentStep] = {};
    const int64_t whole = (keys + kStepKeys - 1) / kStepKeys * kStepKeys;
    for (int64_t c = 0; c < columns; c += kLatentStep, rows += kLatentStep) {
      uint32_t* block = to + c * kPagePairs;
      for (int64_t key = 0; key < whole; key += 2, block += kWords) {
        const uint16_t* even = key < keys ? rows + key * stride : zeros;
        const uint16_t* odd = key + 1 < keys ? rows + (key + 1) * stride : zeros;
        S::pair_columns(even, odd, block, block + kWords * kPagePairs);
      }
    }
  }

  // Key i of the quad of each row of a tile: S::share_bytes.
  static constexpr int64_t quad_key(int64_t row, int64_t i) {
    return 2 * row + i / 2 + i % 2 * (kPageTokens / 2);
  }

  static void read_scales(const CodePage& page, int64_t row_bytes, int64_t blocks, int64_t columns) {
    Vectors::read_block_scales(page, row_bytes, blocks, kPageTokens);
    alignas(64) uint32_t shares[kPagePairs][kShareBlocks];
    for (int64_t at = 0; at < columns / kQ8Block; at += kShareBlocks) {
      const float* scales = Vectors::scales_of(page, at, 0);
      auto largest = S::zero();
      for (int64_t key = 0; key < page.keys; key++) {
        largest = S::max(S::load(scales + key * kScaleBlocks), largest);
      }
      S::store(page.largest + at, largest);
      // No scale is smaller but zero, whose codes are zero.
      const auto to_shares = S::div(S::set(kWholeOne), S::max(largest, S::set(0x1p-24f)));
      for (int64_t j = 0; j < kPagePairs; j++, scales += 2 * kScaleBlocks) {
        S::store_codes(shares[j], S::whole_pairs(S::mul(S::load(scales), to_shares),
                                                 S::mul(S::load(scales + kScaleBlocks), to_shares)));
      }
      turn_page(shares[0], page.shares + at * kPagePairs);
    }
  }

  // Words [kPagePairs][kWords] to [kWords][kPagePairs].
  static void turn_page(const uint32_t* words, uint32_t* to) {
    alignas(64) uint32_t turned[kTile];
    for (int64_t half = 0; half < kPagePairs; half += kWords) {
      Vectors::turn(words + half * kWords, kWords, kWords, turned);
      for (int64_t i = 0; i < kRows; i++) {
        S::store_codes(to + i * kPagePairs + half, S::load_codes(turned + i * kWords));
      }
    }
  }

  static void weigh(const float* scores, int64_t keys, float scale_log2e, LatentState* state,
                    uint32_t* words) {
    alignas(64) uint32_t pairs[kPagePairs][kHeadLanes];
    Vectors::weigh(scores, keys, scale_log2e, state, pairs[0]);
    const int64_t whole = (keys + kStepKeys - 1) / kStepKeys * kWords;
    std::fill(pairs[(keys + 1) / 2], pairs[whole], 0u);
    for (int64_t j = 0; j < whole; j += kWords) {
      Vectors::turn(pairs[j], kHeadLanes, kHeadLanes, words + j * kHeadLanes);
    }
  }

  static void weigh_codes(const float* scores, int64_t keys, float scale_log2e, const float* exponents,
                          LatentState* state, uint32_t* words, float* factors) {
    alignas(64) uint32_t pairs[kPagePairs][kHeadLanes];
    Vectors::weigh_codes(scores, keys, scale_log2e, exponents, state, pairs[0], factors);
    std::fill(pairs[(keys + 1) / 2], pairs[kPagePairs], 0u);
    turn_page(pairs[0], words);
  }

  // A block of 16 columns: sums in tile c, values through tiles b and b + 1.
  template <int c, int b>
  static void add_block(const uint32_t* values, bool two_steps, float* weighted) {
    S::template load_tile<c>(weighted, kTileBytes);
    S::template load_tile<b>(values, kTileBytes);
    S::template dot_pairs<c, 6, b>();
    if (two_steps) {
      S::template load_tile<b + 1>(values + kTile, kTileBytes);
      S::template dot_pairs<c, 7, b + 1>();
    }
    S::template store_tile<c>(weighted, kTileBytes);
  }
  static void add_values(const uint32_t* words, int64_t keys, const uint32_t* values, int64_t columns,
                         float* weighted) {
    const bool two_steps = keys > kStepKeys;
    S::configure(typename S::TileShapes{});
    S::template load_tile<6>(words, kTileBytes);
    if (two_steps) S::template load_tile<7>(words + kTile, kTileBytes);
    for (int64_t c = 0; c < columns; c += kLatentStep, values += 4 * kTile, weighted += 2 * kTile) {
      add_block<0, 2>(values, two_steps, weighted);
      add_block<1, 4>(values + 2 * kTile, two_steps, weighted + kTile);
    }
    S::release();
  }

  // A block of columns of a page: two tiles of quads. After the last key any code does, its weight is zero.
  template <bool is_whole>
  static void quad_block(const CodePage& page, int64_t row_bytes, int64_t block, uint32_t* quads) {
    const auto* codes = reinterpret_cast<const int8_t*>(page.rows + block * kQ8Bytes + 2);
    for (int64_t half = 0; half < 2; half++, codes += kWords) {
      KVFOLD_FOUR_STEPS for (int64_t row = 0; row < kRows; row++, quads += kWords) {
        const int8_t* four[4];
        for (int64_t i = 0; i < 4; i++) {
          const int64_t key = quad_key(row, i);
          four[i] = codes + (is_whole ? key : std::min(key, page.keys - 1)) * row_bytes;
        }
        S::store_codes(quads, S::quad_columns(four));
      }
    }
  }

  static void add_codes(CodePage* pages, int64_t num_pages, int64_t row_bytes, const CodeSums* tiles,
                        int64_t num_tiles, int64_t columns, bool are_first) {
    alignas(64) uint32_t quads[2][2 * kTile];
    alignas(64) uint8_t bytes[2][2][kHeadLanes][kTileBytes];  // of weights of two products: low, high
    alignas(64) int32_t sums[2][4][kTile];
    // Products: blocks, the pages of each, the tiles of heads of each.
    struct Product {
      int64_t block, n, tile;
    };
    const int64_t count = columns / kQ8Block * num_pages * num_tiles;
    const auto next = [&](Product p) {
      if (++p.tile == num_tiles) p.tile = 0, p.n++;
      if (p.n == num_pages) p.n = 0, p.block++;
      return p;
    };
    Product prepared{0, 0, 0}, added{0, 0, 0};  // next to be
    const auto quads_of = [&](int64_t i) { return quads[i / num_tiles % 2]; };
    const auto prepare = [&](int64_t i) {
      const auto [block, n, tile] = std::exchange(prepared, next(prepared));
      Vectors::template bring_near<kValueLines>(pages[n]);
      if (tile == 0) {
        const bool is_whole = pages[n].keys == kPageTokens;
        (is_whole ? quad_block<true> : quad_block<false>)(pages[n], row_bytes, block, quads_of(i));
      }
      const uint32_t* shares = pages[n].shares + block * kPagePairs;
      const uint32_t* words = tiles[tile].words + n * kPagePairs * kHeadLanes;
      for (int64_t head = 0; head < kHeadLanes; head++) {
        S::share_bytes(words + head * kPagePairs, shares, bytes[i % 2][0][head], bytes[i % 2][1][head]);
      }
    };
    const auto multiply = [&](int64_t i) {
      S::written();
      clear_tiles<0, 4>();
      S::template load_tile<4>(bytes[i % 2][0], kTileBytes);
      S::template load_tile<6>(quads_of(i), kTileBytes);
      S::template dot_bytes<0, 4, 6>();
      S::template load_tile<5>(bytes[i % 2][1], kTileBytes);
      S::template dot_bytes<1, 5, 6>();
      S::template load_tile<7>(quads_of(i) + kTile, kTileBytes);
      S::template dot_bytes<2, 4, 7>();
      S::template dot_bytes<3, 5, 7>();
      S::template store_tile<0>(sums[i % 2][0], kTileBytes);
      S::template store_tile<1>(sums[i % 2][1], kTileBytes);
      S::template store_tile<2>(sums[i % 2][2], kTileBytes);
      S::template store_tile<3>(sums[i % 2][3], kTileBytes);
    };
    const auto add = [&](int64_t i) {
      const auto [block, n, tile] = std::exchange(added, next(added));
      alignas(64) float factor[kHeadLanes];
      S::store(factor,
               S::mul(S::load(tiles[tile].factors + n * kHeadLanes), S::set(pages[n].largest[block])));
      const bool is_first = are_first && n == 0;
      float* to = tiles[tile].weighted + block * 2 * kTile;
      for (int half = 0; half < 2; half++, to += kTile) {
        const int32_t *low = sums[i % 2][2 * half], *high = sums[i % 2][2 * half + 1];
        for (int64_t at = 0; at < kTile; at += kWords) {
          const auto sum = S::to_floats(S::add_high(S::load_codes(low + at), S::load_codes(high + at)));
          S::store(to + at,
                   S::fma(sum, S::set(factor[at / kWords]), is_first ? S::zero() : S::load(to + at)));
        }
      }
    };
    // A product is prepared while the one before is multiplied and the one before that is added.
    S::configure(typename S::TileShapes{});
    prepare(0);
    for (int64_t i = 0; i < count; i++) {
      if (i + 1 < count) prepare(i + 1);
      multiply(i);
      if (i > 0) add(i - 1);
    }
    add(count - 1);
    S::release();
  }

  static void raise(const float* exponents, LatentState* state, float* weighted, int64_t columns) {
    const auto before = S::load(state->exponent), now = S::max(S::load(exponents), before);
    alignas(64) float shrink[kHeadLanes];
    S::store(shrink, exp2<V>(S::sub(before, now)));
    S::store(state->exponent, now);
    for (int64_t head = 0; head < kHeadLanes; head++) {
      if (shrink[head] == 1.0f || state->sum[head] == 0.0f) continue;
      state->sum[head] *= shrink[head];
      const auto factor = S::set(shrink[head]);
      for (float* at = weighted + head * kWords; at < weighted + columns * kHeadLanes; at += kTile) {
        S::store(at, S::mul(S::load(at), factor));
      }
    }
  }

  static void merge(const LatentState& other, const float* other_weighted, LatentState* state,
                    float* weighted, int64_t columns) {
    const auto a = S::load(state->exponent), b = S::load(other.exponent), now = S::max(a, b);
    alignas(64) float shrink_a[kHeadLanes], shrink_b[kHeadLanes];
    S::store(shrink_a, exp2<V>(S::sub(a, now)));
    S::store(shrink_b, exp2<V>(S::sub(b, now)));
    S::store(state->exponent, now);
    S::store(state->sum,
             S::fma(S::load(other.sum), S::load(shrink_b), S::mul(S::load(state->sum), S::load(shrink_a))));
    for (int64_t at = 0; at < columns * kHeadLanes; at += kWords) {
      const int64_t head = at / kWords % kHeadLanes;
      const auto ours = S::mul(S::load(weighted + at), S::set(shrink_a[head]));
      S::store(weighted + at, S::fma(S::load(other_weighted + at), S::set(shrink_b[head]), ours));
    }
  }

  static void divide(const LatentState& state, const float* weighted, int64_t heads, int64_t count,
                     float* out, int64_t stride) {
    for (int64_t head = 0; head < heads; head++) {
      const auto sum = S::set(state.sum[head]);
      const float* from = weighted + head * kWords;
      for (int64_t c = 0; c < count; c += kWords, from += kTile) {
        S::store_first(out + head * stride + c, S::div(S::load(from), sum), std::min(kWords, count - c));
      }
    }
  }

  static constexpr LatentKernels kernels() {
    LatentKernels kernels = Vectors::kernels();
    kernels.pack_codes = Vectors::template pack_codes<0>;
    kernels.pair_values = pair_values;
    kernels.read_scales = read_scales;
    kernels.score_pairs = score_pairs;
    kernels.score_codes = score_codes;
    kernels.raise = raise;
    kernels.weigh = weigh;
    kernels.add_values = add_values;
    kernels.weigh_codes = weigh_codes;
    kernels.add_codes = add_codes;
    kernels.merge = merge;
    kernels.divide = divide;
    return kernels;
  }
};

}  // namespace
}  // namespace kvfold
