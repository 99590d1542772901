// Building blocks of the CPU loops: run-time chosen vector width, half types, streaming stores.
#pragma once

#include <cstdint>
#include <cstring>

#include "feature.h"
#include "arithmetic.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Compiles a function for AVX-512, AVX2 and the baseline and picks at load time. It belongs on the
// function that holds the hot loop: what the loop calls must be inlined into it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define KD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KD_CLONES
#endif

namespace kdfast::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
KD_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Conversions are integer arithmetic with masks for conditions: a branch would stop the vectoriser.
KD_HD uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - uint32_t(condition);
  return (yes & mask) | (no & ~mask);
}

KD_HD float widen(float x) { return x; }
KD_HD double widen(double x) { return x; }
KD_HD float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
KD_HD float widen(Half x) {
  // Exponent and mantissa moved in place, then rebiased by 2^112, which is exact for subnormals.
  const float scaled = bits_as<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  return bits_as<float>(bits_as<uint32_t>(scaled) | special | sign);
}

template <typename T>
KD_HD T narrow_to(float x) {
  return T(x);
}
template <typename T>
KD_HD T narrow_to(double x) {
  return T(x);
}
template <>
KD_HD BFloat16 narrow_to<BFloat16>(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {uint16_t(select(nan, 0x7fc0u, rounded >> 16))};
}
template <>
KD_HD Half narrow_to<Half>(float x) {
  // Overflow saturates to infinity in the first product; adding `magic`, whose unit in the last
  // place is half's, rounds to nearest even, subnormals included.
  const uint32_t bits = bits_as<uint32_t>(x);
  const float magnitude = bits_as<float>(bits & 0x7fffffffu);
  const float base = (magnitude * 0x1p112f) * 0x1p-110f;
  const uint32_t high = (bits + bits) & 0xff000000u;
  const uint32_t exponent = select(high < 0x71000000u, 0x71000000u, high);
  const float magic = bits_as<float>((exponent >> 1) + 0x07800000u);
  const uint32_t sum = bits_as<uint32_t>(magic + base);
  const uint32_t value = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  return {uint16_t(sign | select(bits + bits > 0xff000000u, 0x7e00u, value))};
}

// Calls body(T{}) with the storage type T of a feature accumulated in A.
template <typename A, typename Body>
void with_storage(Storage storage, Body&& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(double{});
  } else if (storage == Storage::kHalf) {
    body(Half{});
  } else if (storage == Storage::kBFloat16) {
    body(BFloat16{});
  } else {
    body(float{});
  }
}

// Copies past the caches: the target is not read first, and the source of the next rows stays.
// A stream_fence() must follow before another thread reads the data.
inline void stream_copy(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    auto* target = static_cast<__m128i*>(to);
    const auto* source = static_cast<const __m128i*>(from);
    for (size_t i = 0; i < bytes / 16; ++i) {
      _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Asks for memory that is read soon but not next.
inline void prefetch(const void* from, size_t bytes) {
#if defined(__GNUC__)
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace kdfast::cpu
