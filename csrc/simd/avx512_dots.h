// Row dots and panels of types in 512-bit vectors.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/quant_formats.h"
#include "simd/avx2_dots.h"
#include "simd/avx512_codes.h"

namespace kvfold {
namespace {

// Types without code in 512-bit vectors have that of 256-bit ones, as all do for rows that fill no panel.
template <class T>
struct Fast<Avx512, T> : std::conditional_t<kHas256<T>, Fast256<Avx512, T>, NoFast> {};

template <class T>
struct OfPanels : TakesApart<T> {
  static constexpr bool kDot = true, kUnpack = true, kQuads = false;
};

// 32 nibbles under one float16, or two, the second the minimum, with fifth bits before them in Q5_0 and Q5_1.
template <class T>
struct FastNibbles : OfPanels<T> {
  static constexpr bool kHasMin = Parts<T>::kHasMin;
  static constexpr int64_t kBytes = sizeof(T), kNibbles = kBytes - 16,
                           kFifths = kHasMin ? 4 : 2;  // where they begin
  static constexpr bool kHasFifth = kNibbles > kFifths;
  // Of 128 codes: the low nibbles of four blocks side by side, then the high ones. Both have the same scales
  // a lane.
  static constexpr int place(int piece) { return piece % 2 * 4 + piece / 2; }
  // What is subtracted: this times the minimums, or scales where there are none, times the sums of x.
  static constexpr float kZero = kHasMin ? -1.0f : Format<Avx512, T>::kZero;

  // Of 16 blocks. load(at) has the 64 bytes after byte `at` of them.
  struct Scales {
    __m512 scale, zero;  // what kZero is multiplied by
  };
  template <class Load>
  static Scales scales_from(const Load& load) {
    if constexpr (kBytes == 18) {  // word 9 i of 64 is the scale of block i, for 8 blocks a pair of vectors
      const __m512i spread = _mm512_castsi256_si512(
          _mm256_setr_epi32(0 | 9 << 16, 18 | 27 << 16, 36 | 45 << 16, 54 | 63 << 16, 0, 0, 0, 0));
      const __m512i first = _mm512_permutex2var_epi16(load(0), spread, load(64));
      const __m512i second = _mm512_permutex2var_epi16(load(8 * kBytes), spread, load(8 * kBytes + 64));
      const __m512 scale = _mm512_cvtph_ps(
          _mm256_inserti128_si256(_mm512_castsi512_si256(first), _mm512_castsi512_si128(second), 1));
      return {scale, scale};
    } else {  // three blocks begin within 64 bytes, the last block in the last 64
      constexpr int each = 0x01010101, i = kBytes * each, j = 2 * i, last = (64 - kBytes) * each;
      const __m512i bytes =
          _mm512_add_epi8(_mm512_set1_epi32(0x03020100),
                          _mm512_setr_epi32(0, i, j, 0, i, j, 0, i, j, 0, i, j, 0, i, j, last));
      __m512i heads = _mm512_permutexvar_epi8(bytes, load(0));
#pragma GCC unroll 5
      for (int turn = 1; turn < 6; turn++) {
        const int64_t at = turn < 5 ? 3 * turn * kBytes : 16 * kBytes - 64;
        heads = _mm512_mask_permutexvar_epi8(heads, ~uint64_t{0} << 12 * turn, bytes, load(at));
      }
      const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(heads));
      if constexpr (!kHasMin) return {scale, scale};
      return {scale, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(heads, 16)))};
    }
  }
  static Scales scales(const uint8_t* p) {
    return scales_from([&](int64_t at) { return _mm512_loadu_si512(p + at); });
  }
  // Of fewer than 16; nothing after them is read.
  static Scales scales(const uint8_t* p, int64_t count) {
    return scales_from([&](int64_t at) {  // zeros after the last block
      const int64_t bytes = std::clamp<int64_t>(count * kBytes - at, 0, 64);
      const uint64_t mask = bytes == 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
      return _mm512_maskz_loadu_epi8(mask, p + at);
    });
  }

  // Four blocks side by side: nibbles, and the fifth bits of a block in both halves of each 64-bit lane of
  // its quarter. 64 bytes have all of three blocks.
  struct Four {
    __m512i nibbles, fifth;
  };
  // Bytes of a block for each quarter, in the 64 bytes that begin with such a byte.
  static __m512i of_three(__m512i bytes) {
    constexpr int64_t each = 0x0101010101010101, i = kBytes * each, j = 2 * i;
    return _mm512_add_epi8(bytes, _mm512_setr_epi64(0, 0, i, i, j, j, 0, 0));
  }
  static Four side_by_side(const uint8_t* p) {
    const __m512i in_order = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0f0e0d0c0b0a0908, 0x0706050403020100));
    const uint8_t* last = p + 3 * kBytes;
    const __m512i three = _mm512_permutexvar_epi8(of_three(in_order), _mm512_loadu_si512(p + kNibbles));
    Four four = {_mm512_mask_broadcast_i32x4(three, 0xf000, Avx512::load16(last + kNibbles)),
                 _mm512_setzero_si512()};
    if constexpr (kHasFifth) {
      const __m512i word = _mm512_set1_epi32(0x03020100);
      const __m512i words = _mm512_permutexvar_epi8(of_three(word), _mm512_loadu_si512(p + kFifths));
      four.fifth = _mm512_mask_set1_epi32(words, 0xf000, static_cast<int>(blocks::load32(last + kFifths)));
    }
    return four;
  }
  static Four side_by_side(const uint8_t* p, int64_t count) {  // of fewer than four
    uint8_t blocks[4 * kBytes] = {};
    std::memcpy(blocks, p, count * kBytes);
    return side_by_side(blocks);
  }
  static __m512i low(const Four& of) {
    if constexpr (!kHasFifth) return Nibbles<T>::low(of.nibbles);
    return with_fifths(Nibbles<T>::low(of.nibbles), of.fifth, fifth_places(0));
  }
  static __m512i high(const Four& of) {
    if constexpr (!kHasFifth) return Nibbles<T>::high(of.nibbles);
    return with_fifths(Nibbles<T>::high(of.nibbles), of.fifth, fifth_places(16));
  }
  static __m512i fifth_places(char first) {  // of 16 bits from bit `first`, less 4, modulo 64
    const __m128i places = _mm_setr_epi8(60, 61, 62, 63, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11);
    return _mm512_add_epi8(_mm512_broadcast_i32x4(places), _mm512_set1_epi8(first));
  }

  // The codes 4 quad to 4 quad + 3 of 16 rows, a lane each: nibbles, with their fifth bits out of the
  // rows' 32.
  template <bool is_signed>
  static __m512i quad_codes(__m512i nibbles, __m512i bits, int quad) {
    if constexpr (kHasFifth) {
      const __m512i places =
          _mm512_set1_epi64(0x1f1e1d1c3f3e3d3c);  // of bits 0 to 3 of both lanes' 32, less 4
      const __m512i codes =
          with_fifths(nibbles, bits, _mm512_add_epi8(places, _mm512_set1_epi8(static_cast<char>(4 * quad))));
      return is_signed ? _mm512_sub_epi8(codes, _mm512_set1_epi8(Format<Avx512, T>::kZero)) : codes;
    }
    return nibbles;
  }

  template <int rows>
  static void add_four(const Four& blocks, const __m512 (&scale)[rows], __m512i lanes, const DotRow* x,
                       int64_t at, __m512 (&sum)[rows]) {
    const __m512i first = low(blocks), second = high(blocks);
    for (int r = 0; r < rows; r++) {
      __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, Avx512::load_codes(x[r].codes + at));
      dot = _mm512_dpbusd_epi32(dot, second, Avx512::load_codes(x[r].codes + at + 64));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale[r]), sum[r]);
    }
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i steps[4] = {lanes, _mm512_add_epi32(lanes, _mm512_set1_epi32(4)),
                              _mm512_add_epi32(lanes, _mm512_set1_epi32(8)),
                              _mm512_add_epi32(lanes, _mm512_set1_epi32(12))};
    __m512 sum[rows], minus[rows], scale[rows];
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm512_setzero_ps();
    const int64_t num_blocks = k / 32;
    int64_t block = 0;
    for (; block + 16 <= num_blocks; block += 16) {
      const uint8_t* p = row + block * kBytes;
      const Scales d = scales(p);
      for (int r = 0; r < rows; r++) {
        scale[r] = _mm512_mul_ps(d.scale, _mm512_loadu_ps(x[r].scales + block));
        minus[r] = _mm512_fmadd_ps(d.zero, _mm512_loadu_ps(x[r].sums + block), minus[r]);
      }
#pragma GCC unroll 4
      for (int64_t line = 4; 64 * line < 16 * kBytes; line++) Avx512::prefetch(p + ahead + 64 * line);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Avx512::prefetch(p + ahead + 64 * i);
        add_four<rows>(side_by_side(p + 4 * i * kBytes), scale, steps[i], x, 32 * (block + 4 * i), sum);
      }
    }
    if (block < num_blocks) {
      const int64_t count = num_blocks - block;
      const uint8_t* p = row + block * kBytes;
      const Scales d = scales(p, count);
      for (int r = 0; r < rows; r++) {
        scale[r] = _mm512_mul_ps(d.scale, _mm512_loadu_ps(x[r].scales + block));
        minus[r] = _mm512_fmadd_ps(d.zero, _mm512_loadu_ps(x[r].sums + block), minus[r]);
      }
      for (int64_t i = 0; i < count; i += 4) {
        Avx512::prefetch(p + ahead + i * kBytes);
        Avx512::prefetch(p + ahead + i * kBytes + 64);
        const uint8_t* from = p + i * kBytes;
        const Four blocks = i + 4 <= count ? side_by_side(from) : side_by_side(from, count - i);
        add_four<rows>(blocks, scale, steps[i / 4], x, 32 * (block + i), sum);
      }
    }
    for (int r = 0; r < rows; r++) {
      y[r] = _mm512_reduce_add_ps(_mm512_fnmadd_ps(minus[r], _mm512_set1_ps(kZero), sum[r]));
    }
  }

  template <bool is_signed = false>
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    using Codes = std::conditional_t<is_signed && !kHasFifth && !kHasMin, SignedNibbles<T>, Nibbles<T>>;
    constexpr int64_t kRows = 32, kFields = kHasMin ? 2 : 1, kRecord = 32 * kRows + 4 * kRows * kFields;
    for (int64_t block = 0; block < k / 32; block++, raw += kBytes, panel += kRecord) {
      // Written well before vectors of them are loaded, which waits until every part is in the cache.
      alignas(64) uint16_t halves[kFields][kRows];
      [[maybe_unused]] alignas(64) uint32_t fifths[kRows];
      for (int64_t i = 0; i < kRows; i++) {
        const uint8_t* row = raw + i * row_bytes;
        for (int64_t field = 0; field < kFields; field++) halves[field][i] = blocks::load16(row + 2 * field);
        if constexpr (kHasFifth) fifths[i] = blocks::load32(row + kFifths);
      }
      for (int64_t v = 0; v < 2; v++) {
        __m512i packed[4], bits = _mm512_setzero_si512();
        Avx512::transpose(raw + 16 * v * row_bytes + kNibbles, row_bytes, packed);
        if constexpr (kHasFifth) bits = _mm512_load_si512(fifths + 16 * v);
        for (int j = 0; j < 4; j++) {
          const auto put = [&](int quad, __m512i nibbles) {
            _mm512_store_si512(panel + (2 * quad + v) * 64, quad_codes<is_signed>(nibbles, bits, quad));
          };
          put(j, Codes::low(packed[j]));
          put(4 + j, Codes::high(packed[j]));
        }
      }
      // A minimum is minus the second float16, and a panel has it negated.
      auto* to = reinterpret_cast<float*>(panel + 32 * kRows);
      for (int64_t field = 0; field < kFields; field++) {
        for (int64_t i = 0; i < kRows; i += 16, to += 16) {
          _mm512_store_ps(to, Avx512::load_half(reinterpret_cast<const uint8_t*>(halves[field] + i)));
        }
      }
    }
  }
};
template <>
struct Fast<Avx512, blocks::Q4_0> : FastNibbles<blocks::Q4_0> {};
template <>
struct Fast<Avx512, blocks::Q4_1> : FastNibbles<blocks::Q4_1> {};
template <>
struct Fast<Avx512, blocks::Q5_0> : FastNibbles<blocks::Q5_0> {};
template <>
struct Fast<Avx512, blocks::Q5_1> : FastNibbles<blocks::Q5_1> {};
template <>
struct Fast<Avx512, blocks::IQ4_NL> : FastNibbles<blocks::IQ4_NL> {};

// 32 signed bytes under one float16: 34 bytes a block.
template <>
struct Fast<Avx512, blocks::Q8_0> : OfPanels<blocks::Q8_0> {
  static constexpr int64_t kBytes = 34;
  static constexpr int place(int piece) { return piece; }

  // Two blocks side by side, unsigned.
  static __m512i two(const uint8_t* p) {
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)));
    const __m512i both =
        _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kBytes + 2)), 1);
    return _mm512_xor_si512(both, _mm512_set1_epi8(-128));
  }

  // The scales of 4 blocks: words 0, 17, 34 and 51 of 64.
  static __m128i scales(const uint8_t* p) {
    const __m512i spread = _mm512_castsi128_si512(_mm_setr_epi32(0 | 17 << 16, 34 | 51 << 16, 0, 0));
    return _mm512_castsi512_si128(
        _mm512_permutex2var_epi16(_mm512_loadu_si512(p), spread, _mm512_loadu_si512(p + 64)));
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    __m512 sum[rows], minus[rows];
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm512_setzero_ps();
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i next = _mm512_add_epi32(lanes, _mm512_set1_epi32(2));
    const int64_t num_blocks = k / 32;
    int64_t block = 0;
    const uint8_t* p = row;
    for (; block + 4 <= num_blocks; block += 4, p += 4 * kBytes) {
      const __m512 d = _mm512_castps128_ps512(_mm_cvtph_ps(scales(p)));
      Avx512::prefetch(p + ahead);
      Avx512::prefetch(p + ahead + 64);
      Avx512::prefetch(p + ahead + 128);
      const __m512i first = two(p), second = two(p + 2 * kBytes);
      for (int r = 0; r < rows; r++) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_castps128_ps512(_mm_loadu_ps(x[r].scales + block)));
        minus[r] = _mm512_castps128_ps512(_mm_fmadd_ps(
            _mm512_castps512_ps128(d), _mm_loadu_ps(x[r].sums + block), _mm512_castps512_ps128(minus[r])));
        const int8_t* codes = x[r].codes + 32 * block;
        const __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, Avx512::load_codes(codes));
        const __m512i b = _mm512_dpbusd_epi32(_mm512_setzero_si512(), second, Avx512::load_codes(codes + 64));
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_permutexvar_ps(lanes, scale), sum[r]);
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), _mm512_permutexvar_ps(next, scale), sum[r]);
      }
    }
    float rest[rows] = {};
    for (; block < num_blocks; block++, p += kBytes) {
      const float d = blocks::half_at(p);
      const __m256i codes = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)),
                                             _mm256_set1_epi8(-128));
      for (int r = 0; r < rows; r++) {
        const __m256i dot = _mm256_dpbusd_epi32(
            _mm256_setzero_si256(), codes,
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[r].codes + 32 * block)));
        const auto total = static_cast<float>(_mm512_reduce_add_epi32(_mm512_zextsi256_si512(dot)));
        rest[r] += d * (x[r].scales[block] * total - 128.0f * x[r].sums[block]);
      }
    }
    for (int r = 0; r < rows; r++) {
      const __m512 zeros = _mm512_maskz_mov_ps(0x000f, minus[r]);
      y[r] = rest[r] + _mm512_reduce_add_ps(_mm512_fnmadd_ps(zeros, _mm512_set1_ps(128.0f), sum[r]));
    }
  }

  template <bool is_signed = false>
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    const __m512i change = _mm512_set1_epi8(is_signed ? 0 : -128);
    for (int64_t block = 0; block < k / 32; block++, raw += kBytes, panel += 32 * 36) {
      alignas(64) uint16_t halves[32];
      for (int64_t i = 0; i < 32; i++) halves[i] = blocks::load16(raw + i * row_bytes);
      for (int v = 0; v < 2; v++) {
        for (int half = 0; half < 2; half++) {
          __m512i quads[4];
          Avx512::transpose(raw + 16 * v * row_bytes + 2 + 16 * half, row_bytes, quads);
          for (int j = 0; j < 4; j++) {
            _mm512_store_si512(panel + (2 * (4 * half + j) + v) * 64, _mm512_xor_si512(quads[j], change));
          }
        }
      }
      auto* to = reinterpret_cast<float*>(panel + 32 * 32);
      for (int v = 0; v < 2; v++) {
        _mm512_store_ps(
            to + 16 * v,
            _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves + 16 * v))));
      }
    }
  }
};

// Types of 256 weights.
template <class T>
struct DotHalves : TakesApart<T> {
  static constexpr bool kDot = true, kUnpack = false, kQuads = false;
  static constexpr int kRun = Parts<T>::kRun;
  // Of 128 codes, as Halves has them.
  static constexpr int place(int piece) {
    return kRun == 16 ? piece : piece / 2 % 2 * 4 + piece / 4 * 2 + piece % 2;
  }

  // A number of each run of a block, zeros after eight.
  static __m512 of_runs(const float* p) {
    if constexpr (kRun == 16) return _mm512_loadu_ps(p);
    return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
  }

  template <int rows>
  static void dot(const uint8_t* row, int64_t k, const DotRow* x, float* y, int64_t ahead) {
    // Runs of the first vector of the first half, and from there to those of the second vector and half.
    const __m512i lanes = kRun == 16 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                     : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
    constexpr int kNextVector = kRun == 16 ? 4 : 1, kNextHalf = 128 / kRun;
    __m512 sum[rows], minus[rows];
    for (int r = 0; r < rows; r++) sum[r] = minus[r] = _mm512_setzero_ps();
    for (int64_t at = 0; at < k; at += 256, row += sizeof(T)) {
#pragma GCC unroll 4
      for (size_t line = 0; line < sizeof(T); line += 64) Avx512::prefetch(row + ahead + line);
      __m512 d, subtracted, scale[rows];
      Halves<T>::scales(row, d, subtracted);
      for (int r = 0; r < rows; r++) {
        scale[r] = _mm512_mul_ps(d, of_runs(x[r].scales + at / kRun));
        minus[r] = _mm512_fmadd_ps(subtracted, of_runs(x[r].sums + at / kRun), minus[r]);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m512i codes[2];
        Halves<T>::codes(row, half, codes);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const __m512i runs = _mm512_add_epi32(lanes, _mm512_set1_epi32(kNextHalf * half + kNextVector * i));
          for (int r = 0; r < rows; r++) {
            const __m512i of_x = Avx512::load_codes(x[r].codes + at + 128 * half + 64 * i);
            const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes[i], of_x);
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(runs, scale[r]), sum[r]);
          }
        }
      }
    }
    constexpr float kZero = Parts<T>::kHasMin ? 1.0f : Parts<T>::kZero;
    for (int r = 0; r < rows; r++) {
      y[r] = _mm512_reduce_add_ps(_mm512_fnmadd_ps(minus[r], _mm512_set1_ps(kZero), sum[r]));
    }
  }
};
template <>
struct Fast<Avx512, blocks::Q2_K> : DotHalves<blocks::Q2_K> {};
template <>
struct Fast<Avx512, blocks::Q3_K> : DotHalves<blocks::Q3_K> {};
template <>
struct Fast<Avx512, blocks::Q5_K> : DotHalves<blocks::Q5_K> {};

// Sixteen numbers of each of 16 rows, number j of all of them to place(j).
template <class OfRow, class Place>
inline void put_transposed(const OfRow& of_row, const Place& place) {
  alignas(64) float numbers[16][16];
  for (int64_t i = 0; i < 16; i++) _mm512_store_ps(numbers[i], of_row(i));
  for (int64_t j = 0; j < 16; j += 4) {
    __m512i columns[4];
    Avx512::transpose(reinterpret_cast<const uint8_t*>(numbers[0] + j), sizeof numbers[0], columns);
    for (int64_t c = 0; c < 4; c++) _mm512_store_si512(place(j + c), columns[c]);
  }
}

template <>
struct Fast<Avx512, blocks::Q4_K> : DotHalves<blocks::Q4_K> {
  static constexpr bool kUnpack = true;

  template <bool is_signed = false>  // the same: there are no negative codes
  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    constexpr int64_t kRecord = 32 * 32 + 2 * 128;
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t at = 0; at < k; at += 256, raw += sizeof(blocks::Q4_K), panel += 8 * kRecord) {
      for (int v = 0; v < 2; v++) {
        const uint8_t* rows = raw + 16 * v * row_bytes;
        const __m512 negative =
            _mm512_insertf32x8(_mm512_setzero_ps(), _mm256_set1_ps(-0.0f), 1);  // the minimums
        put_transposed(
            [&](int64_t i) {
              return _mm512_xor_ps(Halves<blocks::Q4_K>::both(rows + i * row_bytes), negative);
            },
            [&](int64_t j) { return panel + j % 8 * kRecord + 32 * 32 + j / 8 * 128 + 64 * v; });
        for (int pair = 0; pair < 4; pair++) {
          for (int half = 0; half < 2; half++) {
            __m512i packed[4];
            Avx512::transpose(rows + 16 + 32 * pair + 16 * half, row_bytes, packed);
            for (int j = 0; j < 4; j++) {
              uint8_t* to = panel + 2 * pair * kRecord + (2 * (4 * half + j) + v) * 64;
              _mm512_store_si512(to, _mm512_and_si512(packed[j], nibble));
              _mm512_store_si512(to + kRecord, _mm512_and_si512(_mm512_srli_epi16(packed[j], 4), nibble));
            }
          }
        }
      }
    }
  }
};

template <>
struct Fast<Avx512, blocks::Q6_K> : DotHalves<blocks::Q6_K> {
  static constexpr bool kUnpack = true;

  static void unpack(const uint8_t* raw, int64_t row_bytes, int64_t k, uint8_t* panel) {
    constexpr int64_t kRecord = 32 * 32 + 2 * 128;
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t at = 0; at < k; at += 256, raw += sizeof(blocks::Q6_K), panel += 8 * kRecord) {
      for (int v = 0; v < 2; v++) {
        const uint8_t* rows = raw + 16 * v * row_bytes;
        put_transposed([&](int64_t i) { return Halves<blocks::Q6_K>::scales(rows + i * row_bytes); },
                       [&](int64_t j) { return panel + j / 2 * kRecord + 32 * 32 + j % 2 * 128 + 64 * v; });
        for (int half = 0; half < 2; half++) {
          for (int part = 0; part < 2; part++) {  // 16 of the 32 bytes of upper bits
            __m512i high[4];
            Avx512::transpose(rows + 128 + 32 * half + 16 * part, row_bytes, high);
            for (int side = 0; side < 2; side++) {  // runs of 32: `side` and `side` + 2 of this half
              __m512i packed[4];
              Avx512::transpose(rows + 64 * half + 32 * side + 16 * part, row_bytes, packed);
              for (int j = 0; j < 4; j++) {
                uint8_t* to = panel + (4 * half + side) * kRecord + (2 * (4 * part + j) + v) * 64;
                const __m512i top = side == 0 ? _mm512_slli_epi16(high[j], 4) : _mm512_slli_epi16(high[j], 2);
                const __m512i bottom = side == 0 ? high[j] : _mm512_srli_epi16(high[j], 2);
                _mm512_store_si512(to, on_top(_mm512_and_si512(packed[j], nibble), top, 0x30));
                _mm512_store_si512(
                    to + 2 * kRecord,
                    on_top(_mm512_and_si512(_mm512_srli_epi16(packed[j], 4), nibble), bottom, 0x30));
              }
            }
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace kvfold
