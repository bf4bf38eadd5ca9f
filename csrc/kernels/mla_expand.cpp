// Keys and values out of latents.

#include "kernels/mla_up.h"

#include <algorithm>
#include <cstring>

#include "kernels/rounded_expand.h"
#include "kernels/tile.h"

namespace kvfold {
namespace {

// A unit of work decodes its head's rows once for this many tokens: 131,072 weights for 128 * 131,072
// multiply-adds.
constexpr int64_t kTokenBlock = 128;

}  // namespace

int64_t up_panel_floats(const KvUp& up) { return std::max(panel_floats(up.uk()), panel_floats(up.uv())); }

int64_t append_full_floats(const MlaDims& dims, const KvUp& up, bool rounds) {
  return rounds ? expand_rounded_floats(dims, up) : up_panel_floats(up) + kTokenBlock * (dims.qk() + dims.v);
}

int64_t append_full_shared_floats(const MlaDims& dims, bool rounds) {
  return rounds ? rounded_latent_floats(dims, kLatentKeys) : 0;
}

void expand(const MlaDims& dims, const KvUp& up, int64_t head, const Latents& latents, int64_t n,
            float* panel, float* k, int64_t k_stride, float* v, int64_t v_stride) {
  const Weight &uk = up.uk(), &uv = up.uv();
  for (int64_t i = 0; i < n; i++) {
    if (!up.kv_b) std::memset(k + i * k_stride, 0, dims.nope * 4);
    std::memcpy(k + i * k_stride + dims.nope, latents.k_rope + i * latents.rope_stride, dims.rope * 4);
  }
  const int64_t count = up.kv_b ? dims.nope : dims.kv_lora;
  for_panels(uk, up.uk_row(dims, head), count, panel, [&](const float* rows, int64_t at, int64_t num) {
    if (up.kv_b) {
      tiles().nt(latents.c_kv, latents.c_stride, nullptr, n, rows, uk.cols, num, dims.kv_lora, k + at,
                 k_stride);
    } else {
      tiles().nn(latents.c_kv + at, latents.c_stride, n, rows, uk.cols, dims.nope, num, k, k_stride);
    }
  });
  for_panels(uv, up.uv_row(dims, head), dims.v, panel, [&](const float* rows, int64_t at, int64_t num) {
    tiles().nt(latents.c_kv, latents.c_stride, nullptr, n, rows, uv.cols, num, dims.kv_lora, v + at,
               v_stride);
  });
}

namespace {

// The same with rounded latents, for as many rows at a time as the shared space holds.
void append_full_rounded(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up,
                         Matrix c_kv, Matrix k_rope, const CacheArray& k_cache, const CacheArray& v_cache,
                         int64_t layer) {
  const int64_t rows = step.num_rows();
  int64_t window = (rows + kLatentKeys - 1) / kLatentKeys * kLatentKeys;
  while (rounded_latent_floats(dims, window) > machine.shared_floats) window -= kLatentKeys;
  const RoundedLatents latents{dims, up, machine.shared, window};
  for (int64_t start = 0; start < rows; start += window) {
    const int64_t count = std::min(window, rows - start);
    const int64_t blocks = (count + kLatentKeys - 1) / kLatentKeys;
    const auto block_rows = [&](int64_t block) { return std::min(kLatentKeys, count - block * kLatentKeys); };
    machine.team.for_each(blocks, [&](int64_t block, int) {
      const int64_t first = block * kLatentKeys;
      latents.round(c_kv.row(start + first), c_kv.stride, first, block_rows(block));
    });
    machine.team.for_each(dims.heads * blocks, [&](int64_t unit, int member) {
      const int64_t head = unit / blocks, first = unit % blocks * kLatentKeys, n = block_rows(unit % blocks);
      const int64_t* slots = step.slots.data() + start + first;
      const float* v = expand_values(latents, head, first, n, machine.of(member));
      for (int64_t i = 0; i < n; i++) {
        write_slot(v_cache, layer, slots[i], v + i * dims.v, head * dims.v, dims.v);
      }
      float* k = expand_keys(latents, head, first, n, machine.of(member));
      for (int64_t i = 0; i < n; i++) {
        std::memcpy(k + i * dims.qk() + dims.nope, k_rope.row(start + first + i), dims.rope * 4);
        write_slot(k_cache, layer, slots[i], k + i * dims.qk(), head * dims.qk(), dims.qk());
      }
    });
  }
}

}  // namespace

void append_full(const Machine& machine, const Step& step, const MlaDims& dims, const KvUp& up, Matrix c_kv,
                 Matrix k_rope, const CacheArray& k_cache, const CacheArray& v_cache, int64_t layer) {
  if (machine.rounds) {
    return append_full_rounded(machine, step, dims, up, c_kv, k_rope, k_cache, v_cache, layer);
  }
  const int64_t rows = step.num_rows(), blocks = (rows + kTokenBlock - 1) / kTokenBlock;
  machine.team.for_each(dims.heads * blocks, [&](int64_t unit, int member) {
    const int64_t head = unit / blocks, first = unit % blocks * kTokenBlock;
    const int64_t n = std::min(kTokenBlock, rows - first);
    float* k = machine.of(member) + up_panel_floats(up);
    float* v = k + n * dims.qk();
    const Latents latents{c_kv.row(first), c_kv.stride, k_rope.row(first), k_rope.stride};
    expand(dims, up, head, latents, n, machine.of(member), k, dims.qk(), v, dims.v);
    for (int64_t i = 0; i < n; i++) {
      const int64_t slot = step.slots[first + i];
      write_slot(k_cache, layer, slot, k + i * dims.qk(), head * dims.qk(), dims.qk());
      write_slot(v_cache, layer, slot, v + i * dims.v, head * dims.v, dims.v);
    }
  });
}

}  // namespace kvfold
