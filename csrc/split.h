// Runs and bits of split networks, for the CPU loops and the CUDA kernels; no torch.
#pragma once

#include "philox.h"

namespace kdfast {

// `length` consecutive rows, columns or units from `source` on go to `target` on.
struct Run {
  int64_t source, target, length;
};

// Eight mask bits, elements 8 * byte to 8 * byte + 7: bit i is set where 24 random bits of that
// element reach `threshold`. Elements from `count` on have none.
KD_HD uint8_t drawn_bits(uint64_t key, int64_t byte, int64_t count, uint32_t threshold) {
  uint32_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const Bits4 random = philox(key, counter_of(uint32_t(2 * byte + half), 0, 0));
    for (int i = 0; i < 4; ++i) {
      const bool set = (random.word[i] >> 8) >= threshold && 8 * byte + 4 * half + i < count;
      bits |= uint32_t(set) << (4 * half + i);
    }
  }
  return uint8_t(bits);
}

}  // namespace kdfast
