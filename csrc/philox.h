// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). The same bits on every device, for any split of the work; no torch.
#pragma once

#include "arithmetic.h"

namespace kdfast {

struct Bits4 {
  uint32_t word[4];
};

// Both halves of the 64-bit product of a constant and a word.
KD_HD void product(uint32_t constant, uint32_t word, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__
  high = __umulhi(constant, word);  // nvcc adds a zero to the half of a 64-bit product
  low = constant * word;
#else
  const uint64_t wide = uint64_t(constant) * word;
  high = uint32_t(wide >> 32);
  low = uint32_t(wide);
#endif
}

// The keys of the ten rounds.
struct RoundKeys {
  uint32_t low[10], high[10];
};

KD_HD RoundKeys round_keys(uint64_t key) {
  RoundKeys keys{};
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    keys.low[round] = low;
    keys.high[round] = high;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return keys;
}

// 128 random bits of `counter`. As a kernel's parameter the keys are operands from constant memory.
KD_HD Bits4 philox(const RoundKeys& keys, Bits4 counter) {
  uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    uint32_t p_high, p_low, q_high, q_low;
    product(0xD2511F53u, a, p_high, p_low);
    product(0xCD9E8D57u, c, q_high, q_low);
    a = q_high ^ b ^ keys.low[round];
    b = q_low;
    c = p_high ^ d ^ keys.high[round];
    d = p_low;
  }
  return {{a, b, c, d}};
}

// 128 random bits of `counter` under the 64-bit `key`.
KD_HD Bits4 philox(uint64_t key, Bits4 counter) { return philox(round_keys(key), counter); }

// The counter of element block `block` (four elements) of dataset item `id`, sample `sample`.
// Blocks take 32 bits, ids 64, samples 32.
KD_HD Bits4 counter_of(uint32_t block, uint64_t id, uint32_t sample) {
  return {{block, uint32_t(id), uint32_t(id >> 32), sample}};
}

// Uniform on [0, 1): 24 bits, exact in float.
KD_HD float uniform(uint32_t bits) { return float(bits >> 8) * 0x1p-24f; }

}  // namespace kdfast
