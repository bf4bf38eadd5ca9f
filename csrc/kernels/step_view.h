// What every kernel sees of a step and of the machine it runs on.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "thread_team.h"

namespace kvfold {

constexpr int64_t kPageTokens = 64;

// A matrix of float32 rows: a buffer of the step, or some of its columns.
struct Matrix {
  float* data;
  int64_t stride;  // numbers from row to row
  int64_t width;

  float* row(int64_t i) const { return data + i * stride; }
  // Expert ids share the buffers of numbers.
  int32_t* ids(int64_t i) const { return reinterpret_cast<int32_t*>(row(i)); }
};

// How the sequences of one path stand in a step: neighbours, so their rows are one range.
struct PathRange {
  bool fused = true;
  int32_t first_sequence = 0, last_sequence = 0;
  int64_t first_row = 0, last_row = 0;

  int64_t num_rows() const { return last_row - first_row; }
};

// How a product on a file's blocks is computed: by row dots, by tiles, or as is faster for its number of
// rows. Bits differ between the two, so a run that must not depend on what is beside a row fixes them by
// role.
enum class ProductForm { kBySize, kDots, kTiles };

// Neighbouring rows of one role: of prompts, or generated ones.
struct RoleRange {
  bool is_prompt;
  int64_t first, last;
};

enum class Path { kStandard = 0, kAbsorbed = 1, kDecompressed = 2 };

// model/step.py: Step, plus what follows from it.
struct Step {
  std::vector<int32_t> token_ids;    // [T]
  std::vector<int64_t> slots;        // [T]
  std::vector<int32_t> row_starts;   // [S + 1]
  std::vector<int32_t> kv_lens;      // [S]
  std::vector<int32_t> page_starts;  // [S + 1]
  std::vector<int32_t> pages;
  std::vector<int32_t> output_rows;  // [R]
  std::vector<int32_t> is_prompt;    // [S] 1 or 0
  std::vector<float> cos, sin;       // [T, rope / 2]
  int64_t num_pairs = 0;             // rope / 2

  PathRange ranges[3];               // by Path
  std::vector<int32_t> sequence_of;  // [T]
  std::vector<int64_t> visible;      // [T] keys that a row sees
  std::vector<RoleRange> roles;      // of all rows
  std::vector<RoleRange> output_roles;

  int64_t num_rows() const { return static_cast<int64_t>(token_ids.size()); }
  int64_t num_outputs() const { return static_cast<int64_t>(output_rows.size()); }
  const PathRange& range(Path path) const { return ranges[static_cast<int>(path)]; }
  const int32_t* page_list(int32_t sequence) const { return pages.data() + page_starts[sequence]; }
};

// Parts of a workspace share no cache line.
constexpr int64_t kLineFloats = 16;  // 64 bytes
inline int64_t whole_lines(int64_t floats) { return (floats + kLineFloats - 1) / kLineFloats * kLineFloats; }

// Who computes, and where intermediate tiles go. No kernel allocates.
struct Machine {
  ThreadTeam& team;
  float* scratch;  // [team.size(), member_floats]: panels and tiles of each member
  int64_t member_floats;
  float* shared;  // [shared_floats]: what members hand to each other within an op
  int64_t shared_floats;
  // Products round what they multiply weights by, and attention what it multiplies: quant/activations.py,
  // quant/attention.py.
  bool rounds;
  ProductForm form = ProductForm::kBySize;

  float* of(int member) const { return scratch + member * member_floats; }
};

// The workspace cannot hold the smallest tile of an op.
struct WorkspaceTooSmall : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void refuse_workspace(const std::string& op, int64_t needed_floats,
                                          int64_t shared_floats) {
  throw WorkspaceTooSmall(op + ": needs " + std::to_string(needed_floats * 4) +
                          " bytes of workspace beside the threads' own, has " +
                          std::to_string(shared_floats * 4) + ": raise workspace_bytes (--workspace) by " +
                          std::to_string((needed_floats - shared_floats) * 4) + " or more.");
}

}  // namespace kvfold
