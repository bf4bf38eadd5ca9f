// The recorded network (model/program.py) as plain structs: segments of ops over numbered weights and
// symbolic buffers.

#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace kvfold {

enum class OpKind {
  kEmbed,
  kNorm,
  kLinear,
  kRope,
  kAppendLatent,
  kFoldQ,
  kAttendLatent,
  kUnfoldV,
  kAttendExpanded,
  kAppendFull,
  kAttendFull,
  kSwiglu,
  kAdd,
  kRoute,
  kExperts,
  kTakeOutputs,
};

// What the rows of a buffer are: model/program.py, Domain.
enum class Domain { kRows = 0, kOutputs = 1, kAbsorbed = 2 };

// Columns [start, start + width) of a buffer. Buffer 0 of every segment is x, the hidden rows.
struct Value {
  int32_t buffer;
  int64_t start;
  int64_t width;
};

struct Op {
  OpKind kind;
  std::string name;
  std::vector<Value> inputs, outputs;
  std::vector<int32_t> weights;  // handles; -1 for an absent one
  std::vector<int64_t> ints;
  std::vector<double> floats;
};

struct Buffer {
  int64_t width;
  Domain domain;
  int32_t first,
      last;  // ops between which it lives; -1 and the number of ops: from before, to after the segment
};

struct Segment {
  std::string name;
  std::vector<Op> ops;
  std::vector<Buffer> buffers;
  Value x_out;                                         // buffer -1 after the head
  std::vector<std::pair<std::string, Value>> outputs;  // whole buffers
};

// An output of the last segment: [R, width] by name.
struct OutputSpec {
  std::string name;
  int64_t width;
};

// A row of Step.segments: sequences [first, last) take `path`.
struct PathSegment {
  int32_t path, fused, first, last;
};

}  // namespace kvfold
