#include "cpu/random.h"

#include <cstring>

#include "normal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kdfast::cpu {
namespace {

constexpr int kLanes = 64;                // counters handled at a time
constexpr int kCounterBlock = 4 * kLanes;  // elements they give

namespace baseline {
using Wide = uint64_t __attribute__((vector_size(16)));
#if defined(__x86_64__)
inline Wide product(Wide a, Wide b) { return Wide(_mm_mul_epu32(__m128i(a), __m128i(b))); }
#else
inline Wide product(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
#include "cpu/random_lanes.h"
}  // namespace baseline

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define KD_WIDTHS
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
using Wide = uint64_t __attribute__((vector_size(32)));
inline Wide product(Wide a, Wide b) { return Wide(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
#include "cpu/random_lanes.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f")
namespace avx512f {
using Wide = uint64_t __attribute__((vector_size(64)));
// Masked by nothing: GCC 12 warns about the plain form's own undefined operand.
inline Wide product(Wide a, Wide b) {
  return Wide(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
}
#include "cpu/random_lanes.h"
}  // namespace avx512f
#pragma GCC pop_options
#endif

// Widest last.
const RandomLoops kLoops[] = {
    {"default", true, baseline::normals, baseline::words},
#ifdef KD_WIDTHS
    {"avx2", __builtin_cpu_supports("avx2") != 0, avx2::normals, avx2::words},
    {"avx512f", __builtin_cpu_supports("avx512f") != 0, avx512f::normals, avx512f::words},
#endif
};

const RandomLoops* widest() {
  const RandomLoops* found = kLoops;
  for (const RandomLoops& loops : kLoops) {
    if (loops.supported) found = &loops;
  }
  return found;
}

}  // namespace

const RandomLoops* find_random_loops(const char* name) {
  for (const RandomLoops& loops : kLoops) {
    if (std::strcmp(loops.name, name) == 0) return &loops;
  }
  return nullptr;
}

const RandomLoops& random_loops() {
  static const RandomLoops& loops = *widest();
  return loops;
}

}  // namespace kdfast::cpu
