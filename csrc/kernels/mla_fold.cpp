// Queries down to latents and back: the absorbed path's two products.

#include <cstring>

#include "kernels/mla_up.h"
#include "kernels/tile.h"

namespace kvfold {

void fold_q(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix q,
            Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const int64_t rows = range.num_rows();
  if (rows == 0) return;
  const Weight& uk = up.uk();
  machine.team.for_each(dims.heads, [&](int64_t head, int member) {
    const float* from = q.row(range.first_row) + head * dims.qk();
    float* to = out.data + head * dims.latent();
    for (int64_t i = 0; i < rows; i++) {
      float* folded = to + i * out.stride;
      std::memset(folded, 0, dims.kv_lora * 4);
      std::memcpy(folded + dims.kv_lora, from + i * q.stride + dims.nope, dims.rope * 4);
    }
    const int64_t count = up.kv_b ? dims.nope : dims.kv_lora;
    for_panels(
        uk, up.uk_row(dims, head), count, machine.of(member), [&](const float* panel, int64_t at, int64_t n) {
          if (up.kv_b) {
            tiles().nn(from + at, q.stride, rows, panel, uk.cols, dims.kv_lora, n, to, out.stride);
          } else {
            tiles().nt(from, q.stride, nullptr, rows, panel, uk.cols, n, dims.nope, to + at, out.stride);
          }
        });
  });
}

void unfold_v(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix o,
              Matrix out) {
  const PathRange& range = step.range(Path::kAbsorbed);
  const int64_t rows = range.num_rows();
  if (rows == 0) return;
  const Weight& uv = up.uv();
  const int64_t panels = num_panels(uv, dims.v), size = panel_rows(uv);
  machine.team.for_each(dims.heads * panels, [&](int64_t unit, int member) {
    const int64_t head = unit / panels, at = unit % panels * size, n = std::min(size, dims.v - at);
    const float* panel = decode_panel(uv, up.uv_row(dims, head) + at, n, machine.of(member));
    tiles().nt(o.data + head * dims.kv_lora, o.stride, nullptr, rows, panel, uv.cols, n, dims.kv_lora,
               out.row(range.first_row) + head * dims.v + at, out.stride);
  });
}

}  // namespace kvfold
