// What the machine can do at most: the loops that `kvfold bench` compares a model with.
//
// Owns the loops alone. Who runs them, on how many threads, and the clock are the caller's.

#pragma once

#include <cstdint>

namespace kvfold {

// The sum of the 64-bit words of `size` bytes at `data`, read with the widest loads this machine has. What is
// left over of 512 bytes at the end is not read.
using ReadLoop = uint64_t (*)(const uint8_t* data, int64_t size);
// streams: 1 or 4. Which is faster depends on the machine.
ReadLoop read_loop(int streams);

// One kind of multiply-add at its peak: the instruction repeated over accumulators that stay in registers.
struct Peak {
  const char* isa;
  int64_t round_madds;  // multiply-adds of one round
  void (*run)(int64_t rounds);
};

// What the kernels of this project multiply with, best first for the machine. `run` is null where it has no
// instruction for it.
Peak int8_peak();        // unsigned times signed 8 bits, added to 32 bits
Peak int8_tiles_peak();  // the same by whole tiles of 64 columns
Peak bf16_peak();        // bfloat16 pairs, added to float32
Peak f32_peak();         // float32

}  // namespace kvfold
