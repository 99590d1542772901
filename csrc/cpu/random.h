// Random bits and normals of neighbouring counters (philox.h, normal.h), at the vector width of
// this CPU. Every width gives the same bits.
#pragma once

#include <cstdint>

namespace kdfast::cpu {

// The first `count` elements of the row (id, sample), from element 4 * block on.
using NormalLoop = void (*)(uint64_t key, uint64_t id, uint32_t sample, uint32_t block,
                            int64_t count, float* out);
using WordLoop = void (*)(uint64_t key, uint64_t id, uint32_t sample, uint32_t block,
                          int64_t count, uint32_t* out);

struct RandomLoops {
  const char* name;  // "default", "avx2", "avx512f"
  bool supported;    // by this CPU
  NormalLoop normals;
  WordLoop words;
};

// The loops of that name, null if there are none.
const RandomLoops* find_random_loops(const char* name);

// The widest loops that this CPU supports.
const RandomLoops& random_loops();

}  // namespace kdfast::cpu
