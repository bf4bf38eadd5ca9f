// The algorithms of latent_kernels.h once, over the vocabulary of an instruction set. Included last by
// isa/latent_*.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/exp2.h"
#include "kernels/latent_kernels.h"
#include "kernels/quant_formats.h"

#define KVFOLD_UNROLLED_LATENT _Pragma("GCC unroll 16")
// Otherwise GCC 12 moves sums from register to register once a step: 61 instead of 74 GMAC/s of AVX2.
#define KVFOLD_FOUR_STEPS _Pragma("GCC unroll 4")

namespace kvfold {
namespace {

template <class S>
inline DecodeWeights fast_decode(int32_t type) {
  if (type == 1) return FastDecode<S, F16Numbers>::row;
  if (type == 30) return FastDecode<S, Bf16Numbers>::row;
  DecodeWeights found = nullptr;
  for_each_quantized([&](auto of, int32_t id) {
    if (id == type) found = FastDecode<S, typename decltype(of)::type>::row;
  });
  return found;
}

template <class S>
inline FoldColumns fast_fold(int32_t type) {
  FoldColumns found = nullptr;
  for_each_quantized([&](auto of, int32_t id) {
    if (id == type) found = FastFold<S, typename decltype(of)::type>::rows;
  });
  return found;
}

template <class S>
struct LatentTile {
  using Floats = typename S::Floats;
  using Ints = typename S::Ints;
  static constexpr int kParts = kHeadLanes / S::kLanes;  // vectors of a row of lanes
  static constexpr int kKeys = S::kLatentKeys, kCodeKeys = S::kLatentCodeKeys,
                       kColumns = S::kLatentColumns;  // of a register tile
  static_assert(kHeadLanes % S::kLanes == 0 && kValueColumns % kColumns == 0);
  static constexpr int64_t kPairStep = 4;  // pairs of keys that values are added up for at a time
  static_assert(kPagePairs % kPairStep == 0);
  // Where there is no product of two signed codes, queries are magnitudes m and signs s, 0 or -1, and keys k
  // meet them as in quant_tile.h: k q = m (k ^ s) - m s, of which the last term is where sums start.
  static constexpr bool kTakesSigns = S::kPairSums;
  // Words of 32 numbers of a query in codes: these, then scales, then starts.
  static constexpr int64_t kSigns = 8 * kHeadLanes, kScales = (kTakesSigns ? 16 : 8) * kHeadLanes,
                           kStarts = kScales + kHeadLanes,
                           kRecord = kTakesSigns ? kStarts + kHeadLanes : kStarts;
  static_assert(kRecord <= kMostRecordWords * kHeadLanes);

  // Numbers of a query that are rounded at a time: 64 bytes.
  static constexpr int64_t kChunk = kLatentStep;

  // Rows of up to 16 words, kHeadLanes of them one after the other, to words [num_words][kHeadLanes].
  static void turn(const void* rows, int64_t row_words, int64_t num_words, uint32_t* to) {
    for (int64_t at = 0; at < num_words; at += 4) {
      for (int64_t lane = 0; lane < kHeadLanes; lane += S::kLanes) {
        Ints four[4];
        S::transpose(static_cast<const uint8_t*>(rows) + (lane * row_words + at) * 4, row_words * 4, four);
        for (int64_t i = 0; i < std::min<int64_t>(4, num_words - at); i++) {
          S::store_codes(to + (at + i) * kHeadLanes + lane, four[i]);
        }
      }
    }
  }

  static void pack_pairs(const float* q, int64_t stride, int64_t heads, int64_t latent, uint32_t* to) {
    alignas(64) uint16_t halves[kHeadLanes][kChunk] = {};
    for (int64_t at = 0; at < latent; at += kChunk, to += kChunk / 2 * kHeadLanes) {
      const int64_t n = std::min(kChunk, latent - at);
      for (int64_t head = 0; head < heads; head++) {
        if (n < kChunk) std::memset(halves[head], 0, sizeof halves[head]);
        S::to_bf16(q + head * stride + at, halves[head], n);
      }
      turn(halves, kChunk / 2, kChunk / 2, to);
    }
  }

  template <int zero>
  static void pack_codes(const float* q, int64_t stride, int64_t heads, int64_t latent, uint32_t* to) {
    alignas(64) int8_t codes[kHeadLanes][kQ8Block] = {};
    alignas(64) uint8_t magnitudes[kHeadLanes][kQ8Block] = {}, signs[kHeadLanes][kQ8Block] = {};
    for (int64_t at = 0; at < latent; at += kQ8Block, to += kRecord) {
      float scales[kHeadLanes] = {};
      int32_t starts[kHeadLanes] = {};
      for (int64_t head = 0; head < heads; head++) {
        int32_t halves[2];
        scales[head] = S::quantize(q + head * stride + at, codes[head], halves);
        if constexpr (kTakesSigns) {
          for (int64_t i = 0; i < kQ8Block; i += 16) {
            starts[head] -= S::take_signs(codes[head] + i, magnitudes[head] + i, signs[head] + i);
          }
        } else {
          for (int8_t& code : codes[head]) code = static_cast<int8_t>(code + zero);
        }
      }
      if constexpr (kTakesSigns) {
        turn(magnitudes, kQ8Block / 4, kQ8Block / 4, to);
        turn(signs, kQ8Block / 4, kQ8Block / 4, to + kSigns);
        std::memcpy(to + kStarts, starts, sizeof starts);
      } else {
        turn(codes, kQ8Block / 4, kQ8Block / 4, to);
      }
      std::memcpy(to + kScales, scales, sizeof scales);
    }
  }

  static void widen(CacheType type, const uint8_t* rows, int64_t row_bytes, int64_t keys, int64_t count,
                    uint16_t* to, int64_t stride) {
    for (int64_t key = 0; key < keys; key++, rows += row_bytes, to += stride) {
      if (type == CacheType::kF32) {
        S::to_bf16(reinterpret_cast<const float*>(rows), to, count);
      } else if (type == CacheType::kBF16) {
        std::memcpy(to, rows, count * 2);
      } else {
        int64_t at = 0;
        for (; at + S::kLanes <= count; at += S::kLanes) S::store_bf16(to + at, S::load_half(rows + 2 * at));
        if (at < count) {
          uint8_t last[2 * S::kLanes] = {};
          uint16_t halves[S::kLanes];
          std::memcpy(last, rows + 2 * at, 2 * (count - at));
          S::store_bf16(halves, S::load_half(last));
          std::memcpy(to + at, halves, 2 * (count - at));
        }
      }
      std::fill(to + count, to + stride, uint16_t{0});
    }
  }

  static void pair_values(const uint16_t* rows, int64_t stride, int64_t keys, int64_t columns, uint32_t* to) {
    static constexpr uint16_t zeros[kValueColumns] = {};
    for (int64_t c = 0; c < columns; c += kValueColumns, rows += kValueColumns) {
      uint32_t* block = to + c * kPagePairs;
      for (int64_t key = 0; key < keys; key += 2, block += kValueColumns) {
        const uint16_t* even = rows + key * stride;
        const uint16_t* odd = key + 1 < keys ? even + stride : zeros;
        for (int64_t i = 0; i < kValueColumns; i += S::kLanes) {
          S::store_codes(block + i, S::interleave(even + i, odd + i));
        }
      }
    }
  }

  // Those of `blocks`, and zeros up to `keys`.
  static void read_block_scales(const CodePage& page, int64_t row_bytes, int64_t blocks, int64_t keys) {
    for (int64_t at = 0; at < blocks; at += kScaleBlocks) {
      const int64_t some = std::min(kScaleBlocks, blocks - at);
      for (int64_t key = 0; key < page.keys; key++) {
        float* scales = scales_of(page, at, key);
        S::q8_scales(page.rows + key * row_bytes + at * kQ8Bytes, some, scales);
        std::fill(scales + some, scales + kScaleBlocks, 0.0f);
      }
      std::fill(scales_of(page, at, page.keys), scales_of(page, at, keys), 0.0f);
    }
  }
  static void read_scales(const CodePage& page, int64_t row_bytes, int64_t blocks, int64_t columns) {
    read_block_scales(page, row_bytes, blocks, (page.keys + 1) / 2 * 2);
    const int64_t pairs = (page.keys + 1) / 2;
    for (int64_t at = 0; at < columns / kQ8Block; at += S::kLanes) {
      const float* scales = scales_of(page, at, 0);
      auto largest = S::zero();
      for (int64_t key = 0; key < page.keys; key++) {
        largest = S::max(S::load(scales + key * kScaleBlocks), largest);
      }
      S::store(page.largest + at, largest);
      // No scale is smaller but zero, whose codes are zero.
      const auto to_shares = S::div(S::set(kWholeOne), S::max(largest, S::set(0x1p-24f)));
      uint32_t* shares = page.shares + at / kShareBlocks * kShareBlocks * kPagePairs + at % kShareBlocks;
      for (int64_t j = 0; j < pairs; j++, scales += 2 * kScaleBlocks) {
        S::store_codes(shares + j * kShareBlocks,
                       S::whole_pairs(S::mul(S::load(scales), to_shares),
                                      S::mul(S::load(scales + kScaleBlocks), to_shares)));
      }
    }
  }
  static float* scales_of(const CodePage& page, int64_t block, int64_t key) {
    return page.scales + (block / kScaleBlocks * kPageTokens + key) * kScaleBlocks + block % kScaleBlocks;
  }

  // use(first key, integral_constant of keys) for all keys, kKeys at a time.
  template <int most, class Use>
  static void use_count(int64_t first, int64_t count, const Use& use) {
    if (count >= most) {
      use(first, std::integral_constant<int, most>{});
    } else if constexpr (most > 1) {
      use_count<most - 1>(first, count, use);
    }
  }

  static void score_pairs(const uint32_t* q, int64_t pairs, const uint16_t* rows, int64_t stride,
                          int64_t keys, float* scores) {
    for (int64_t first = 0; first < keys; first += kKeys) {
      use_count<kKeys>(first, keys - first, [&](int64_t key, auto count) {
        constexpr int n = decltype(count)::value;
        Floats sum[n][kParts];
        KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
          KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) sum[j][p] = S::zero();
        }
        const auto* k = reinterpret_cast<const uint8_t*>(rows + key * stride);
        const int64_t row = 2 * stride;
        const uint32_t* words = q;
        for (int64_t i = 0; i < pairs; i++, k += 4, words += kHeadLanes) {
          Ints query[kParts];
          KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
            query[p] = S::load_codes(words + p * S::kLanes);
          }
          KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
            const auto x = S::four_codes(k + j * row);
            KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
              sum[j][p] = S::dot_bf16(sum[j][p], query[p], x);
            }
          }
        }
        KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
          KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
            S::store(scores + (key + j) * kHeadLanes + p * S::kLanes, sum[j][p]);
          }
        }
      });
    }
  }

  // Lines of what is wanted after the page, and a few behind its end.
  template <int64_t lines>
  static void bring_near(CodePage& page) {
    if (page.next_lines <= 0) return;
    KVFOLD_UNROLLED_LATENT for (int64_t i = 0; i < lines; i++) S::prefetch(page.next + i * kLineBytes);
    page.next += lines * kLineBytes;
    page.next_lines -= lines;
  }

  static void score_codes(const uint32_t* q, int64_t num_blocks, CodePage& page, int64_t row_bytes,
                          float* scores) {
    // kScoreLines for 16 keys: kLines for some blocks of kCodeKeys.
    constexpr int64_t kLines = std::max<int64_t>(1, kScoreLines * kCodeKeys / 16),
                      kLineBlocks = 16 * kLines / (kScoreLines * kCodeKeys);
    int32_t starts[kCodeKeys][kScaleBlocks];  // of integer sums
    for (int64_t first = 0; first < page.keys; first += kCodeKeys) {
      use_count<kCodeKeys>(first, page.keys - first, [&](int64_t key, auto count) {
        constexpr int n = decltype(count)::value;
        float* to = scores + key * kHeadLanes;
        for (int64_t at = 0; at < num_blocks; at += kScaleBlocks) {
          const int64_t some = std::min(kScaleBlocks, num_blocks - at);
          const uint8_t* k = page.rows + key * row_bytes + at * kQ8Bytes;
          const float* scales = scales_of(page, at, key);
          if constexpr (S::kWideZero != 0) {
            for (int j = 0; j < n; j++) S::q8_starts(k + j * row_bytes, some, starts[j]);
          }
          Floats out[n][kParts];
          KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
            KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
              out[j][p] = at == 0 ? S::zero() : S::load(to + j * kHeadLanes + p * S::kLanes);
            }
          }
          const uint32_t* record = q + at * kRecord;
          const uint8_t* codes = k + 2;
          for (int64_t b = 0; b < some; b++, record += kRecord, codes += kQ8Bytes) {
            if (b % kLineBlocks == 0) bring_near<kLines>(page);
            Ints sum[n][kParts];
            KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
              KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
                if constexpr (kTakesSigns) {
                  sum[j][p] = S::load_codes(record + kStarts + p * S::kLanes);
                } else {
                  sum[j][p] = S::kWideZero == 0 ? S::zero_ints() : S::set_ints(starts[j][b]);
                }
              }
            }
            KVFOLD_UNROLLED_LATENT for (int i = 0; i < 8; i++) {
              Ints query[kParts];
              [[maybe_unused]] Ints signs[kParts];
              KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
                query[p] = S::load_codes(record + i * kHeadLanes + p * S::kLanes);
                if constexpr (kTakesSigns) {
                  signs[p] = S::load_codes(record + kSigns + i * kHeadLanes + p * S::kLanes);
                }
              }
              KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
                const Ints four = S::four_codes(codes + j * row_bytes + 4 * i);
                KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
                  if constexpr (kTakesSigns) {
                    const Ints products = S::pairs(query[p], S::exclusive_or(four, signs[p]));
                    sum[j][p] = S::add_ints(sum[j][p], S::widened(products));
                  } else {
                    sum[j][p] = S::template dot<true>(sum[j][p], query[p], four);
                  }
                }
              }
            }
            KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
              const auto scale = S::load(reinterpret_cast<const float*>(record + kScales + p * S::kLanes));
              KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
                out[j][p] = S::fma(S::mul(S::to_floats(sum[j][p]), scale),
                                   S::set(scales[j * kScaleBlocks + b]), out[j][p]);
              }
            }
          }
          KVFOLD_UNROLLED_LATENT for (int j = 0; j < n; j++) {
            KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
              S::store(to + j * kHeadLanes + p * S::kLanes, out[j][p]);
            }
          }
        }
      });
    }
  }

  static void scale_columns(float* weighted, int64_t columns, int part, Floats factor) {
    for (int64_t c = 0; c < columns; c++) {
      float* at = weighted + c * kHeadLanes + part * S::kLanes;
      S::store(at, S::mul(S::load(at), factor));
    }
  }

  static bool is_one(Floats factor) {
    float lanes[S::kLanes];
    S::store(lanes, factor);
    return std::all_of(lanes, lanes + S::kLanes, [](float x) { return x == 1.0f; });
  }

  static void exponents(const float* scores, int64_t keys, float scale_log2e, float* exponents) {
    const auto factor = S::set(scale_log2e), half = S::set(0.5f);
    for (int p = 0; p < kParts; p++) {
      auto most = S::load(scores + p * S::kLanes);
      for (int64_t j = 1; j < keys; j++) {
        most = S::max(S::load(scores + j * kHeadLanes + p * S::kLanes), most);
      }
      S::store(exponents + p * S::kLanes, S::round(S::fma(most, factor, half)));
    }
  }

  static void raise(const float* exponents, LatentState* state, float* weighted, int64_t columns) {
    for (int p = 0; p < kParts; p++) {
      float* exponent = state->exponent + p * S::kLanes;
      const auto before = S::load(exponent), now = S::max(S::load(exponents + p * S::kLanes), before);
      const auto shrink = exp2<S>(S::sub(before, now));
      S::store(exponent, now);
      if (is_one(shrink)) continue;
      float* sum = state->sum + p * S::kLanes;
      S::store(sum, S::mul(S::load(sum), shrink));
      scale_columns(weighted, columns, p, shrink);
    }
  }

  static void weigh(const float* scores, int64_t keys, float scale_log2e, LatentState* state,
                    uint32_t* words) {
    const auto factor = S::set(scale_log2e);
    const Ints ones = S::set_ints(0x3f803f80);
    for (int p = 0; p < kParts; p++) {
      const auto minus = S::mul(S::load(state->exponent + p * S::kLanes), S::set(-1.0f));
      float* sum = state->sum + p * S::kLanes;
      auto added = S::zero();
      for (int64_t key = 0; key < keys; key += 2) {
        const float* at = scores + key * kHeadLanes + p * S::kLanes;
        const auto even = exp2<S>(S::fma(S::load(at), factor, minus));
        const auto odd =
            key + 1 < keys ? exp2<S>(S::fma(S::load(at + kHeadLanes), factor, minus)) : S::zero();
        const Ints pair = S::bf16_pairs(even, odd);
        S::store_codes(words + key / 2 * kHeadLanes + p * S::kLanes, pair);
        added = S::dot_bf16(added, pair, ones);
      }
      S::store(sum, S::add(S::load(sum), added));
    }
  }

  static void add_values(const uint32_t* words, int64_t keys, const uint32_t* values, int64_t columns,
                         float* weighted) {
    const int64_t pairs = (keys + 1) / 2;
    for (int64_t c = 0; c < columns; c += kColumns) {
      const uint32_t* v = values + c / kValueColumns * kValueColumns * kPagePairs + c % kValueColumns;
      const uint32_t* weights = words;
      float* out = weighted + c * kHeadLanes;
      Floats sum[kColumns][kParts];
      KVFOLD_UNROLLED_LATENT for (int i = 0; i < kColumns; i++) {
        KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
          sum[i][p] = S::load(out + i * kHeadLanes + p * S::kLanes);
        }
      }
      for (int64_t j = 0; j < pairs; j++, weights += kHeadLanes, v += kValueColumns) {
        Ints w[kParts];
        KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) w[p] = S::load_codes(weights + p * S::kLanes);
        KVFOLD_UNROLLED_LATENT for (int i = 0; i < kColumns; i++) {
          const Ints value = S::four_codes(v + i);
          KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
            sum[i][p] = S::dot_bf16(sum[i][p], w[p], value);
          }
        }
      }
      KVFOLD_UNROLLED_LATENT for (int i = 0; i < kColumns; i++) {
        KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
          S::store(out + i * kHeadLanes + p * S::kLanes, sum[i][p]);
        }
      }
    }
  }

  static void weigh_codes(const float* scores, int64_t keys, float scale_log2e, const float* exponents,
                          LatentState* state, uint32_t* words, float* factors) {
    const auto factor = S::set(scale_log2e), one = S::set(kWholeOne);
    for (int p = 0; p < kParts; p++) {
      const int64_t lane = p * S::kLanes;
      const auto exponent = S::load(exponents + lane), minus = S::mul(exponent, S::set(-1.0f));
      auto sum = S::zero();
      for (int64_t key = 0; key < keys; key += 2) {
        const float* at = scores + key * kHeadLanes + lane;
        const auto even = exp2<S>(S::fma(S::load(at), factor, minus));
        const auto odd =
            key + 1 < keys ? exp2<S>(S::fma(S::load(at + kHeadLanes), factor, minus)) : S::zero();
        S::store_codes(words + key / 2 * kHeadLanes + lane,
                       S::whole_pairs(S::mul(even, one), S::mul(odd, one)));
        sum = S::add(sum, S::add(even, odd));
      }
      const auto share = exp2<S>(S::sub(exponent, S::load(state->exponent + lane)));
      S::store(state->sum + lane, S::fma(sum, share, S::load(state->sum + lane)));
      // Of a product of two int16 the higher half is kept, rounded: a unit of 2^15.
      S::store(factors + lane, S::mul(share, S::set(0x1p15f / (kWholeOne * kWholeOne))));
    }
  }

  // A block of columns of a page: codes of two keys as words [2][kPagePairs][kValueColumns].
  static void pair_block(const CodePage& page, int64_t row_bytes, int64_t block,
                         uint32_t (*words)[kPagePairs * kValueColumns]) {
    static constexpr int8_t zeros[kQ8Block] = {};
    const auto* codes = reinterpret_cast<const int8_t*>(page.rows + block * kQ8Bytes + 2);
    for (int64_t key = 0; key < page.keys; key += 2, codes += 2 * row_bytes) {
      const int8_t* odd = key + 1 < page.keys ? codes + row_bytes : zeros;
      S::pair_bytes(codes, odd, words[0] + key / 2 * kValueColumns);
      S::pair_bytes(codes + kValueColumns, odd + kValueColumns, words[1] + key / 2 * kValueColumns);
    }
  }
  // The block's values times weights, on top of `weighted`, or instead of it where is_first. `pairs` are
  // whole steps: weights of those after the last key are zero.
  static void add_block(const uint32_t (*values)[kPagePairs * kValueColumns], const uint32_t* weights,
                        int64_t pairs, const Floats (&factor)[kParts], bool is_first, float* weighted) {
    for (int64_t c = 0; c < kQ8Block; c += kColumns) {
      const uint32_t* v = values[c / kValueColumns] + S::pair_place(c % kValueColumns);
      const uint32_t* w = weights;
      Ints sum[kColumns][kParts];
      KVFOLD_UNROLLED_LATENT for (int i = 0; i < kColumns; i++) {
        KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) sum[i][p] = S::zero_ints();
      }
      for (const uint32_t* end = w + pairs * kHeadLanes; w < end;) {
        KVFOLD_UNROLLED_LATENT for (int64_t j = 0; j < kPairStep; j++, w += kHeadLanes, v += kValueColumns) {
          Ints weight[kParts];
          KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) weight[p] =
              S::load_codes(w + p * S::kLanes);
          KVFOLD_UNROLLED_LATENT for (int i = 0; i < kColumns; i++) {
            const Ints value = S::four_codes(v + i);
            KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
              sum[i][p] = S::dot_shorts(sum[i][p], weight[p], value);
            }
          }
        }
      }
      KVFOLD_UNROLLED_LATENT for (int i = 0; i < kColumns; i++) {
        KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
          float* to = weighted + (c + i) * kHeadLanes + p * S::kLanes;
          S::store(to, S::fma(S::to_floats(sum[i][p]), factor[p], is_first ? S::zero() : S::load(to)));
        }
      }
    }
  }

  static void add_codes(CodePage* pages, int64_t num_pages, int64_t row_bytes, const CodeSums* tiles,
                        int64_t num_tiles, int64_t columns, bool are_first) {
    alignas(64) uint32_t values[kQ8Block / kValueColumns][kPagePairs * kValueColumns] = {};
    alignas(64) uint32_t scaled[kPagePairs * kHeadLanes];
    for (int64_t block = 0; block < columns / kQ8Block; block++) {
      const int64_t shares_at = block / kShareBlocks * kShareBlocks * kPagePairs + block % kShareBlocks;
      for (int64_t n = 0; n < num_pages; n++) {
        CodePage& page = pages[n];
        const int64_t pairs = (page.keys + 1) / 2, whole = (pairs + kPairStep - 1) / kPairStep * kPairStep;
        bring_near<kValueLines>(page);
        pair_block(page, row_bytes, block, values);
        for (int64_t tile = 0; tile < num_tiles; tile++) {
          const CodeSums& sums = tiles[tile];
          const uint32_t* words = sums.words + n * kPagePairs * kHeadLanes;
          for (int64_t j = 0; j < pairs; j++) {
            const Ints share = S::four_codes(page.shares + shares_at + j * kShareBlocks);
            KVFOLD_UNROLLED_LATENT for (int p = 0; p < kParts; p++) {
              const int64_t lane = j * kHeadLanes + p * S::kLanes;
              S::store_codes(scaled + lane, S::multiply_shares(S::load_codes(words + lane), share));
            }
          }
          std::fill(scaled + pairs * kHeadLanes, scaled + whole * kHeadLanes, 0u);
          Floats factor[kParts];
          for (int p = 0; p < kParts; p++) {
            factor[p] =
                S::mul(S::load(sums.factors + n * kHeadLanes + p * S::kLanes), S::set(page.largest[block]));
          }
          add_block(values, scaled, whole, factor, are_first && n == 0,
                    sums.weighted + block * kQ8Block * kHeadLanes);
        }
      }
    }
  }

  static void merge(const LatentState& other, const float* other_weighted, LatentState* state,
                    float* weighted, int64_t columns) {
    for (int p = 0; p < kParts; p++) {
      const int64_t lane = p * S::kLanes;
      const auto a = S::load(state->exponent + lane), b = S::load(other.exponent + lane);
      const auto now = S::max(a, b);
      const auto shrink_a = exp2<S>(S::sub(a, now)), shrink_b = exp2<S>(S::sub(b, now));
      S::store(state->exponent + lane, now);
      S::store(state->sum + lane,
               S::fma(S::load(other.sum + lane), shrink_b, S::mul(S::load(state->sum + lane), shrink_a)));
      for (int64_t c = 0; c < columns; c++) {
        float* at = weighted + c * kHeadLanes + lane;
        const auto theirs = S::load(other_weighted + c * kHeadLanes + lane);
        S::store(at, S::fma(theirs, shrink_b, S::mul(S::load(at), shrink_a)));
      }
    }
  }

  static void divide(const LatentState& state, const float* weighted, int64_t heads, int64_t count,
                     float* out, int64_t stride) {
    for (int64_t head = 0; head < heads; head++) {
      const float sum = state.sum[head];
      for (int64_t c = 0; c < count; c++) out[head * stride + c] = weighted[c * kHeadLanes + head] / sum;
    }
  }

  static constexpr LatentKernels kernels() {
    return {pack_pairs,  pack_codes<S::kWideZero>,
            widen,       pair_values,
            read_scales, score_pairs,
            score_codes, exponents,
            raise,       weigh,
            add_values,  weigh_codes,
            add_codes,   merge,
            divide,      fast_decode<S>,
            fast_fold<S>};
  }
};

}  // namespace
}  // namespace kvfold
