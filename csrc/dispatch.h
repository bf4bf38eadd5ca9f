// Which instruction set runs, and what it has: float32 tiles, and matrix kernels in one table of function
// pointers for each type.
//
// The sets are compiled into every build and chosen by what the processor reports; tests force each in turn.
// Forcing changes a process-wide choice between ops, never during one.
#pragma once

#include <cstdint>
#include <vector>

// The sets of x86-64 are GCC target regions around intrinsics; Clang ignores those and gets the generic set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVFOLD_X86_SETS 1
#endif
// Tiles besides where the compiler and its assembler know their names: csrc/CMakeLists.txt.
#if defined(KVFOLD_X86_SETS) && defined(KVFOLD_HAS_AMX)
#define KVFOLD_AMX_SET 1
#endif

namespace kvfold {

// Rows that are multiplied after some others: where they begin is asked for once, when the last of those
// begin, as a unit of work that a member asks for is no other's any more. Refers to a function without
// arguments.
class RowsAfter {
 public:
  RowsAfter() = default;
  template <typename Function>
  RowsAfter(const Function& function)
      : function_(&function), call_([](const void* erased) -> const uint8_t* {
          return (*static_cast<const Function*>(erased))();
        }) {}

  // nullptr: none are known.
  const uint8_t* operator()() const { return function_ ? call_(function_) : nullptr; }

 private:
  const void* function_ = nullptr;
  const uint8_t* (*call_)(const void*) = nullptr;
};

struct PairKernels;    // kernels/pair_kernels.h
struct LatentKernels;  // kernels/latent_kernels.h

// What becomes of activations that meet a type: src/kvfold/quant/activations.py, `Rounding`.
enum class Rounding { kInt8, kBf16, kNone };

// y = x W^T for W in the blocks of its file, x of any rows.
//
// Two forms. `dot` reads every weight row once, in file order, for up to kMaxDotRows rows of x: generation.
// `tile` passes all rows of x over a panel, some columns or all of tile_rows weight rows that were unpacked
// into cache: prompts (kernels/quant_panels.h walks the columns). Both take x in a layout of their
// own, written by prepare_*; nothing here allocates, checks or fails.
struct MatrixKernels {
  int32_t type;  // ggml's number, or one of kernels/side_by_side.h
  Rounding rounding;
  int32_t row_group;  // rows that lie mixed: raw is whole groups of so many

  // Row dots. x: up to kMaxDotRows prepared rows, dot_bytes(k) apart. raw: n rows, row_bytes apart.
  // y[r * ldy + i] = raw row i times x row r. Towards the end the first bytes of the rows `after`, of the
  // same shape, are brought near.
  static constexpr int64_t kMaxDotRows = 4;
  int64_t (*dot_bytes)(int64_t k);
  void (*prepare_dot)(const float* x, int64_t k, uint8_t* prepared);
  void (*dot)(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k, const uint8_t* x, int64_t rows,
              float* y, int64_t ldy, const RowsAfter& after);

  // Rows of x that pass over part of a panel together (kernels/quant_panels.h): whole groups of every set.
  static constexpr int64_t kFewRows = 96;

  // Tiles. Rows of x are prepared in groups of tile_cols, tile_bytes(k) a group; row i of a group is
  // x + pick[i] * ldx, or x + i * ldx where pick is null.
  int32_t tile_rows, tile_cols;
  bool near_panels;  // a tile is fast only on a panel in the first-level cache, for any number of rows
  int64_t (*tile_bytes)(int64_t k);
  void (*prepare_tile)(const float* x, int64_t ldx, const int32_t* pick, int64_t rows, int64_t k,
                       uint8_t* prepared);
  int32_t panel_columns;  // of a panel that fits the first-level cache: whole blocks of any type
  int64_t (*panel_bytes)(int64_t k);
  void (*unpack)(const uint8_t* raw, int64_t row_bytes, int64_t n, int64_t k,
                 uint8_t* panel);  // n <= tile_rows
  // y[i * ldy + j] of all rows i of x, in groups group_bytes apart, and the n rows j of the panel, on top of
  // start[i * ld_start + j] where start is not null. Meanwhile `next`, of next_bytes, is brought near.
  void (*tile)(const uint8_t* panel, int64_t n, int64_t k, const uint8_t* x, int64_t group_bytes,
               int64_t rows, const float* start, int64_t ld_start, float* y, int64_t ldy, const uint8_t* next,
               int64_t next_bytes);
};

struct Tiles;  // kernels/tile.h

struct InstructionSet {
  const char* name;
  const Tiles* tiles;
  const MatrixKernels* kernels;
  int32_t num_kernels;
  const MatrixKernels* side_by_side;  // of types whose rows were put in order for it: kernels/side_by_side.h
  int32_t num_side_by_side;

  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);  // silu(gate) * up
  void (*add_scaled)(const float* x, float factor, float* y, int64_t n);      // y += factor * x

  const PairKernels* pairs;     // attention over keys and values
  const LatentKernels* latent;  // attention over latents

  // nullptr where the type has none: it is decoded to float32 (kernels/weights.h).
  const MatrixKernels* find(int type) const;
};

// Names of the sets that these kernels of a type were written for: "amx" has row dots of "avx512".
struct KernelNames {
  const char *dots, *tiles;
};
KernelNames names_of(const MatrixKernels& kernels);

// Those this processor can run, the fastest first.
const std::vector<const InstructionSet*>& instruction_sets();

// The one in use: the fastest, or the one forced.
const InstructionSet& isa();

// The one of that name, "auto": the one in use. nullptr where this processor has none.
const InstructionSet* find_set(const char* name);

// For programs built and kernels called from now on. False where this processor has no set of that name.
// "auto" undoes.
bool force_isa(const char* name);

}  // namespace kvfold
