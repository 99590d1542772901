// Standard normals from random bits (Box and Muller, "A note on the generation of random normal
// deviates", 1958); no torch.
//
// The logarithm, sine and cosine are polynomials in additions and multiplications of floats that
// are never fused, so that every CPU and every GPU computes the same bits. Coefficients: minimax
// fits, errors 3e-8 (logarithm, relative), 3e-9 (sine) and 3e-8 (cosine).
#pragma once

#include <cstring>

#include "arithmetic.h"
#include "philox.h"

namespace kdfast {

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float float_of(int32_t a) { return __int2float_rn(a); }
__device__ __forceinline__ uint32_t bits_of(float a) { return __float_as_uint(a); }
__device__ __forceinline__ float of_bits(uint32_t a) { return __uint_as_float(a); }
#else
KD_HD float mul(float a, float b) { return a * b; }
KD_HD double mul(double a, double b) { return a * b; }
KD_HD float add(float a, float b) { return a + b; }
KD_HD float root(float a) { return std::sqrt(a); }
KD_HD float float_of(int32_t a) { return float(a); }
KD_HD uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return bits;
}
KD_HD float of_bits(uint32_t a) {
  float value;
  std::memcpy(&value, &a, sizeof(value));
  return value;
}
#endif

// -2 ln((w + 1/2) / 2^31) for the upper 31 bits w of a word; in [0, 44.4], 0 for the largest words.
KD_HD float minus_two_log(uint32_t bits) {
  const uint32_t x = bits_of(add(float_of(int32_t(bits >> 1)), 0.5f)) - 0x3f3504f3u;
  const int32_t exponent = int32_t(x) >> 23;  // of x over sqrt(1/2)
  const float f = add(of_bits((x & 0x007fffffu) + 0x3f3504f3u), -1.0f);
  // q = (-2 ln(1 + f) + 2 f) / f^2, even and odd powers of f apart: half as long a chain.
  const float z = mul(f, f);
  float even = 0x1.25046ap-2f, odd = -0x1.65c680p-3f;
  even = add(mul(even, z), 0x1.535d38p-2f);
  odd = add(mul(odd, z), -0x1.31853ap-2f);
  even = add(mul(even, z), 0x1.00049ap-1f);
  odd = add(mul(odd, z), -0x1.98d2bep-2f);
  even = add(mul(even, z), 0x1.fffffap-1f);
  odd = add(mul(odd, z), -0x1.5556f4p-1f);
  const float q = add(even, mul(odd, f));
  const float log = mul(add(mul(q, f), -2.0f), f);
  return add(mul(float_of(31 - exponent), 0x1.62e430p+0f), log);
}

struct Normal2 {
  float first, second;
};

// Two independent normals. The lower 30 bits of `angle` choose the point of a quarter of the
// circle, the upper two its sign and an exchange of the coordinates.
KD_HD Normal2 normal_pair(uint32_t radius, uint32_t angle) {
  const float r = root(minus_two_log(radius));
  const float f = mul(float_of(int32_t(angle << 2)), 0x1p-32f);  // quarters of the circle
  const float z = mul(f, f);
  float s = -0x1.2d9bb8p-8f;
  s = add(mul(s, z), 0x1.465ec6p-4f);
  s = add(mul(s, z), -0x1.4abbbap-1f);
  s = add(mul(s, z), 0x1.921fb6p+0f);
  s = mul(s, f);
  float c = -0x1.4ea9e6p-6f;
  c = add(mul(c, z), 0x1.03b162p-2f);
  c = add(mul(c, z), -0x1.3bd3a2p+0f);
  c = add(mul(c, z), 1.0f);
  const uint32_t sine = bits_of(mul(r, s));
  const uint32_t cosine = bits_of(mul(r, c)) ^ (angle & 0x80000000u);
  const uint32_t exchange = (sine ^ cosine) & uint32_t(int32_t(angle << 1) >> 31);
  return {of_bits(cosine ^ exchange), of_bits(sine ^ exchange)};
}

struct Normal4 {
  float value[4];
};

KD_HD Normal4 normals_of(Bits4 bits) {
  const Normal2 a = normal_pair(bits.word[0], bits.word[1]);
  const Normal2 b = normal_pair(bits.word[2], bits.word[3]);
  return {{a.first, a.second, b.first, b.second}};
}

}  // namespace kdfast
