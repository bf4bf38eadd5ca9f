// Queries down to latents and back: the absorbed path's two products, a small matrix for each head.
//
//   by rows     out[n] = W[n] . x      on the file's blocks where products round, like any linear layer
//   by columns  out += x[n] W[n]       always in float32: a decoded weight costs half of its multiply-add,
//   and
//                                      blocks along the output have no scale in common to round x for

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "kernels/latent_kernels.h"
#include "kernels/mla_up.h"
#include "kernels/quant_panels.h"
#include "kernels/quant_product.h"
#include "kernels/tile.h"

namespace kvfold {
namespace {

// Weight rows that a member takes at a time where heads are too few to go round.
constexpr int64_t kUnitRows = 64;
// Rows of x that pass over a head's panels together: they stay in the second-level cache.
constexpr int64_t kWindow = kFewRows;
// Up to this many rows of x are folded without a panel: decoding again costs as much as the panel then saves.
constexpr int64_t kMostFoldedRows = 4;
// Columns that a member takes at a time where heads are too few: whole blocks of every type.
constexpr int64_t kUnitColumns = 256;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Heads are shared by members, and cut into `size`d pieces of n where these would be too few.
int64_t pieces_of_head(const ThreadTeam& team, int64_t heads, int64_t n, int64_t size) {
  return heads >= 4 * team.size() || team.size() == 1 ? 1 : pieces(n, size);
}

// Rows [first, first + n) of a part where they lie together in it, else null.
const uint8_t* raw_rows(const Weight& weight, int64_t first, int64_t n) {
  const int64_t part = first / weight.part_rows, within = first % weight.part_rows;
  if (within + n > weight.part_rows) return nullptr;
  return weight.parts[part].raw + within * weight.type->row_bytes(weight.cols);
}

// A head's matrix and what it is multiplied with.
struct HeadProduct {
  int64_t first;  // row of the weight
  const float* x;
  float* out;
};

// out[i, j] = weight row (first + j) times x[i], for n rows of each head.
template <typename Head>
void multiply_by_rows(const Machine& machine, const Weight& weight, int64_t heads, int64_t n, int64_t rows,
                      int64_t ldx, int64_t ldy, const Head& head_at) {
  const int64_t cuts = pieces_of_head(machine.team, heads, n, kUnitRows);
  const int64_t size = cuts == 1 ? n : kUnitRows;
  const int64_t windows = pieces(rows, kWindow), k = weight.cols;
  const auto row_of = [&](int64_t unit) { return unit / windows % cuts * size; };  // of its head
  machine.team.for_each_with_next(heads * cuts * windows, [&](int64_t unit, int member, NextUnit& next_unit) {
    const HeadProduct head = head_at(unit / (cuts * windows));
    const int64_t at = row_of(unit), count = std::min(size, n - at);
    const int64_t row = unit % windows * kWindow, num_rows = std::min(kWindow, rows - row);
    const float* x = head.x + row * ldx;
    float* out = head.out + row * ldy + at;
    const uint8_t* raw = weight.kernels ? raw_rows(weight, head.first + at, count) : nullptr;
    if (raw == nullptr) {
      for_panels(weight, head.first + at, count, machine.of(member),
                 [&](const float* panel, int64_t from, int64_t part) {
                   tiles().nt(x, ldx, nullptr, num_rows, panel, k, part, k, out + from, ldy);
                 });
      return;
    }
    const MatrixKernels& kernels = *weight.kernels;
    const int64_t row_bytes = weight.type->row_bytes(k);
    auto* prepared = reinterpret_cast<uint8_t*>(machine.of(member));
    if (by_dots(machine.form, rows)) {
      const auto rows_after = [&]() -> const uint8_t* {
        const int64_t next = next_unit.take();
        if (next < 0) return nullptr;
        return raw_rows(weight, head_at(next / (cuts * windows)).first + row_of(next), 1);
      };
      const int64_t most = rows_of_dot(machine.form);
      for (int64_t i = 0; i < num_rows; i += most) {
        const int64_t together = std::min(most, num_rows - i);
        for (int64_t j = 0; j < together; j++) {
          kernels.prepare_dot(x + (i + j) * ldx, k, prepared + j * kernels.dot_bytes(k));
        }
        kernels.dot(raw, row_bytes, count, k, prepared, together, out + i * ldy, ldy,
                    i + most >= num_rows ? RowsAfter(rows_after) : RowsAfter());
      }
      return;
    }
    kernels.prepare_tile(x, ldx, nullptr, num_rows, k, prepared);
    uint8_t* panel = prepared + pieces(kWindow, kernels.tile_cols) * kernels.tile_bytes(k);
    auto* sums = reinterpret_cast<float*>(panel + unpacked_bytes(kernels, k));
    for (int64_t first = 0; first < count; first += kernels.tile_rows) {
      const int64_t panel_rows = std::min<int64_t>(kernels.tile_rows, count - first);
      multiply_panels(kernels, {raw + first * row_bytes, row_bytes, panel_rows}, k, prepared, num_rows,
                      out + first, ldy, panel, sums, RowsAfter());
    }
  });
}

int64_t by_rows_floats(const Weight& weight) {
  if (!weight.kernels) return panel_floats(weight);
  const MatrixKernels& kernels = *weight.kernels;
  const int64_t k = weight.cols;
  const int64_t tile = pieces(kWindow, kernels.tile_cols) * kernels.tile_bytes(k) +
                       unpacked_bytes(kernels, k) + sums_bytes(kernels);
  return std::max({panel_floats(weight), pieces(kMostDotRows * kernels.dot_bytes(k), 4), pieces(tile, 4)});
}

// out[i] += x[i, j] times weight row (first + j), over n rows of each head.
template <typename Head>
void multiply_by_columns(const Machine& machine, const Weight& weight, int64_t heads, int64_t n, int64_t rows,
                         int64_t ldx, int64_t ldy, const Head& head_at) {
  const DecodeWeights fast = isa().latent->decode(weight.type->id);
  // Only where products round: in dtype float32 a row's bits do not depend on how many rows are beside it.
  const FoldColumns fold = weight.kernels ? isa().latent->fold(weight.type->id) : nullptr;
  const int64_t k = weight.cols;
  // Each row by itself, whatever is beside it, also where --deterministic asks for row dots.
  const bool alone = rows <= kMostFoldedRows || machine.form == ProductForm::kDots;
  const bool whole = fast == nullptr || weight.parts[0].scale != nullptr || k % kUnitColumns != 0;
  const int64_t cuts = whole ? 1 : pieces_of_head(machine.team, heads, k, kUnitColumns);
  const int64_t columns = k / cuts;
  machine.team.for_each(heads * cuts, [&](int64_t unit, int member) {
    const HeadProduct head = head_at(unit / cuts);
    const int64_t at = unit % cuts * columns, row_bytes = weight.type->row_bytes(k);
    for (int64_t j = 0; j < n; j += kColumnRows) {
      const int64_t count = std::min(kColumnRows, n - j);
      const float* panel = machine.of(member);
      const uint8_t* raw = fast ? raw_rows(weight, head.first + j, count) : nullptr;
      if (raw != nullptr && fold != nullptr && count == kColumnRows && alone) {
        // The rows this member is likely to fold next.
        const int64_t other = unit / cuts + machine.team.size();
        const int64_t next = j + 2 * count <= n ? head.first + j + count
                             : other < heads    ? head_at(other).first
                                                : head.first;
        const uint8_t* next_raw = raw_rows(weight, next, count);
        for (int64_t i = 0; i < rows; i++) {
          fold(raw + weight.type->row_bytes(at), row_bytes, columns, head.x + i * ldx + j,
               head.out + i * ldy + at, next_raw ? next_raw + weight.type->row_bytes(at) : raw);
        }
        continue;
      }
      if (raw == nullptr) {
        panel = decode_panel(weight, head.first + j, count, machine.of(member));
      } else {
        for (int64_t i = 0; i < count; i++) {
          fast(raw + i * row_bytes + weight.type->row_bytes(at), columns, machine.of(member) + i * columns);
        }
      }
      tiles().nn(head.x + j, ldx, rows, panel, columns, columns, count, head.out + at, ldy);
    }
  });
}

}  // namespace

int64_t fold_floats(const KvUp& up) {
  const int64_t columns = up.kv_b ? kColumnRows * up.uk().cols : 0;
  return std::max({columns, by_rows_floats(up.uk()), by_rows_floats(up.uv())});
}

void fold_q(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix q,
            Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const int64_t rows = range.num_rows();
  if (rows == 0) return;
  const auto head_at = [&](int64_t head) -> HeadProduct {
    return {up.uk_row(dims, head), q.row(range.first_row) + head * dims.qk(),
            out.data + head * dims.latent()};
  };
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t head = 0; head < dims.heads; head++) {
      float* folded = out.row(i) + head * dims.latent();
      if (up.kv_b) std::memset(folded, 0, dims.kv_lora * 4);
      const float* rope = q.row(range.first_row + i) + head * dims.qk() + dims.nope;
      std::memcpy(folded + dims.kv_lora, rope, dims.rope * 4);
    }
  }
  if (up.kv_b) {
    multiply_by_columns(machine, up.uk(), dims.heads, dims.nope, rows, q.stride, out.stride, head_at);
  } else {
    multiply_by_rows(machine, up.uk(), dims.heads, dims.kv_lora, rows, q.stride, out.stride, head_at);
  }
}

void unfold_v(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix o,
              Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const int64_t rows = range.num_rows();
  if (rows == 0) return;
  multiply_by_rows(machine, up.uv(), dims.heads, dims.v, rows, o.stride, out.stride,
                   [&](int64_t head) -> HeadProduct {
                     return {up.uv_row(dims, head), o.data + head * dims.kv_lora,
                             out.row(range.first_row) + head * dims.v};
                   });
}

}  // namespace kvfold
