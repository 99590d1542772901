// exp and log as plain arithmetic that compilers vectorise: no tables, branches or calls. Results
// are the same on every machine (with -ffp-contract=off), which those of the C library are not.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "arithmetic.h"

namespace kdfast {

template <typename A>
struct Elementary;

// exp(r) = 1 + r + r^2 * (c0 + c1 r + ...) for |r| <= log(2) / 2.
template <>
struct Elementary<float> {
  using Bits = uint32_t;
  using Signed = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kMagic = 0x1.8p23f;   // adding it rounds to an integer
  static constexpr float kLowest = -86.6f;     // below, exp is taken as 0
  static constexpr float kHighest = 88.73f;    // above, exp is infinite
  static constexpr float kSmall = 0x1p-126f;   // smallest normal number
  static constexpr Bits kHalf = 0x3f000000u;   // 1/2
  static constexpr Bits kRoot = 0x3f3504f3u;   // sqrt(1/2)
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.63p-1f;  // few digits: its products with n are exact
  static constexpr float kLn2Low = -0x1.bd0106p-13f;
  // Fitted: the relative error is at most 3e-9.
  static constexpr float kExp[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.123a2p-7f,
                                   0x1.6a23cep-10f};
  static constexpr int kLogTerms = 5;
};

template <>
struct Elementary<double> {
  using Bits = uint64_t;
  using Signed = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kMagic = 0x1.8p52;
  static constexpr double kLowest = -707.7;
  static constexpr double kHighest = 709.79;
  static constexpr double kSmall = 0x1p-1022;
  static constexpr Bits kHalf = 0x3fe0000000000000ull;
  static constexpr Bits kRoot = 0x3fe6a09e667f3bcdull;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42fep-1;
  static constexpr double kLn2Low = 0x1.f473de6af278fp-30;
  // 1 / (k + 2)!: twelve terms leave 0.02 units in the last place.
  static constexpr double kExp[] = {1.0 / 2,        1.0 / 6,         1.0 / 24,
                                    1.0 / 120,      1.0 / 720,       1.0 / 5040,
                                    1.0 / 40320,    1.0 / 362880,    1.0 / 3628800,
                                    1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  static constexpr int kLogTerms = 11;
};

template <typename To, typename From>
KD_HD To reinterpret_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// condition ? yes : no on the bits. Written as a conditional, the compiler computes one side only,
// in a branch, and a loop around it stays scalar.
template <typename A>
KD_HD A choose(bool condition, A yes, A no) {
  using Bits = typename Elementary<A>::Bits;
  const Bits mask = Bits(0) - Bits(condition);
  return reinterpret_bits<A>(
      Bits((reinterpret_bits<Bits>(yes) & mask) | (reinterpret_bits<Bits>(no) & ~mask)));
}

// c[K] + c[K + 1] x + ... of exp and of 2 atanh(s) / s: c[k] = 2 / (2 k + 1). Recursions, because a
// loop, however short, keeps the vectoriser from the loop around it.
template <typename A, int K>
KD_HD A exp_series(A x) {
  using E = Elementary<A>;
  if constexpr (K + 1 == int(sizeof(E::kExp) / sizeof(A))) {
    return E::kExp[K];
  } else {
    return exp_series<A, K + 1>(x) * x + E::kExp[K];
  }
}

template <typename A, int K>
KD_HD A log_series(A x) {
  if constexpr (K == Elementary<A>::kLogTerms) {
    return A(2.0 / (2 * K + 1));
  } else {
    return log_series<A, K + 1>(x) * x + A(2.0 / (2 * K + 1));
  }
}

// e^x within 1 unit in the last place; results below 2.5e-38 (double 5e-308)
// are 0. exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
template <typename A>
KD_HD A exp_of(A x) {
  using E = Elementary<A>;
  using Bits = typename E::Bits;
  const A shifted = x * E::kLog2e + E::kMagic;
  const A n = shifted - E::kMagic;
  const A r = (x - n * E::kLn2High) - n * E::kLn2Low;
  const A mantissa = (exp_series<A, 0>(r) * r * r + r) + A(1);
  // 2^(n-1): n stands in the lowest bits of `shifted`, what is above them is shifted out.
  const A power =
      reinterpret_bits<A>(Bits((reinterpret_bits<Bits>(shifted) << E::kMantissa) + E::kHalf));
  const A value = (mantissa + mantissa) * power;
  const A above_lowest = choose(x < E::kLowest, A(0), value);
  return choose(x > E::kHighest, std::numeric_limits<A>::infinity(), above_lowest);
}

// log(x) within 1 unit in the last place. log(0) = -inf, log(inf) = inf, NaN for x < 0 and NaN;
// subnormal numbers are exact, too.
template <typename A>
KD_HD A log_of(A x) {
  using E = Elementary<A>;
  using Bits = typename E::Bits;
  using Signed = typename E::Signed;
  // x = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) = 2 atanh(f / (2 + f)).
  const bool tiny = x < E::kSmall;
  const A scaled = choose(tiny, x * A(Bits(1) << E::kMantissa), x);
  const Bits bits = reinterpret_bits<Bits>(scaled);
  const Signed n = Signed(bits - E::kRoot) >> E::kMantissa;
  const A f = reinterpret_bits<A>(Bits(bits - (Bits(n) << E::kMantissa))) - A(1);
  const A s = f / (A(2) + f), square = s * s;
  const A exponent = A(n) - choose(tiny, A(E::kMantissa), A(0));
  // 2 s = f - s f, whose leading part is exact.
  const A small = square * s * log_series<A, 1>(square) - s * f + exponent * E::kLn2Low;
  const A value = exponent * E::kLn2High + (f + small);
  const A infinity = std::numeric_limits<A>::infinity();
  const A positive = choose(x == A(0), -infinity, value);
  const A defined = choose(x < A(0), std::numeric_limits<A>::quiet_NaN(), positive);
  return choose(x < infinity, defined, x);  // inf and NaN stay what they are
}

}  // namespace kdfast
