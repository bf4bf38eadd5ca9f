#include "kernels/rowwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/tile.h"

namespace kvfold {
namespace {

// Rows go to members in blocks of about this many numbers: 10 us of work or more, so one short row stays
// where it is.
constexpr int64_t kBlockNumbers = 32 * 1024;

template <typename Row>
void for_rows(const Machine& machine, int64_t rows, int64_t width, const Row& row) {
  const int64_t block = std::max<int64_t>(1, kBlockNumbers / width);
  machine.team.for_each((rows + block - 1) / block, [&](int64_t unit, int) {
    for (int64_t i = unit * block; i < std::min(rows, (unit + 1) * block); i++) row(i);
  });
}

}  // namespace

float silu(float x) { return x / (1.0f + std::exp(-x)); }

void embed(const Machine& machine, const Step& step, const Weight& table, Matrix out) {
  for_rows(machine, step.num_rows(), out.width, [&](int64_t i) {
    const float* row = decode_panel(table, step.token_ids[i], 1, out.row(i));
    if (row != out.row(i)) std::memcpy(out.row(i), row, out.width * 4);
  });
}

void norm(const Machine& machine, int64_t rows, Matrix x, const Weight& weight, float eps, Matrix out) {
  const float* scale = decode_panel(weight, 0, 1, machine.shared);
  for_rows(machine, rows, x.width, [&](int64_t i) {
    const float* in = x.row(i);
    float* to = out.row(i);
    float squares;
    tiles().nt(in, 0, nullptr, 1, in, 0, 1, x.width, &squares, 0);
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(x.width) + eps);
    for (int64_t c = 0; c < x.width; c++) to[c] = in[c] * factor * scale[c];
  });
}

void rope(const Machine& machine, const Step& step, Matrix x, int64_t head_dim, bool half_split) {
  const int64_t pairs = step.num_pairs;
  // Numbers of a pair stand side by side, or half a vector apart.
  const int64_t apart = half_split ? pairs : 1, next = half_split ? 1 : 2;
  for_rows(machine, step.num_rows(), x.width, [&](int64_t i) {
    const float *cos = step.cos.data() + i * pairs, *sin = step.sin.data() + i * pairs;
    for (int64_t head = 0; head < x.width; head += head_dim) {
      float* part = x.row(i) + head + head_dim - 2 * pairs;
      for (int64_t p = 0; p < pairs; p++) {
        const float a = part[p * next], b = part[p * next + apart];
        part[p * next] = a * cos[p] - b * sin[p];
        part[p * next + apart] = a * sin[p] + b * cos[p];
      }
    }
  });
}

void swiglu(const Machine& machine, int64_t rows, Matrix gate, Matrix up, Matrix out) {
  // An exponential costs about as much as ten other numbers.
  for_rows(machine, rows, 10 * gate.width, [&](int64_t i) {
    for (int64_t c = 0; c < gate.width; c++) out.row(i)[c] = silu(gate.row(i)[c]) * up.row(i)[c];
  });
}

void add(const Machine& machine, int64_t rows, Matrix x, Matrix y, Matrix out) {
  for_rows(machine, rows, x.width, [&](int64_t i) {
    for (int64_t c = 0; c < x.width; c++) out.row(i)[c] = x.row(i)[c] + y.row(i)[c];
  });
}

void take_outputs(const Machine& machine, const Step& step, Matrix x, Matrix out) {
  for_rows(machine, step.num_outputs(), x.width,
           [&](int64_t i) { std::memcpy(out.row(i), x.row(step.output_rows[i]), x.width * 4); });
}

}  // namespace kvfold
