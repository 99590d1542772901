// Arithmetic of the ops, shared by the CPU loops and the CUDA kernels; no torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define KD_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KD_HD __attribute__((always_inline)) inline
#else
#define KD_HD inline
#endif

namespace kdfast {

// Smallest norm an attention map is divided by.
constexpr double kMapEpsilon = 1e-12;

// |x|^p. P is 2, 1, or 0 for any p > 0 given at run time.
template <int P, typename A>
KD_HD A energy(A x, A p) {
  if constexpr (P == 2) {
    return x * x;
  } else if constexpr (P == 1) {
    return std::abs(x);
  } else {
    return std::pow(std::abs(x), p);
  }
}

// d|x|^p/dx / p, with slope 0 at x = 0 for every p; NaN stays NaN.
template <int P, typename A>
KD_HD A energy_slope(A x, A p) {
  if constexpr (P == 2) {
    return x;
  } else if constexpr (P == 1) {
    return x > 0 ? A(1) : (x < 0 ? A(-1) : x);
  } else {
    return x == 0 ? A(0) : std::copysign(std::pow(std::abs(x), p - 1), x);
  }
}

// Two attention maps A and B of one sample, known by A.A, B.B and A.B. These are kept in double:
// ||Qa - Qb||^2 is their difference, which in float would lose all digits of close maps, and the
// square of a float map may exceed the float range.
struct MapPair {
  double own;    // A.A
  double other;  // B.B
  double cross;  // A.B
};

KD_HD double map_norm(double square) {
  const double norm = std::sqrt(square);
  return norm < kMapEpsilon ? kMapEpsilon : norm;
}

// ||Qa - Qb||^2 with Q = A / max(||A||, epsilon); exactly 0 for equal maps, NaN stays NaN.
KD_HD double map_distance(const MapPair& pair) {
  const double own = map_norm(pair.own), other = map_norm(pair.other);
  const double distance =
      pair.own / (own * own) + pair.other / (other * other) - 2 * pair.cross / (own * other);
  return distance < 0 ? 0 : distance;
}

// d(scale * ||Qa - Qb||^2)/dA[i] = factor * ((Qa - Qb)[i] - shrink * Qa[i]).
template <typename A>
struct MapSlope {
  A own, other;  // 1 / norm of either map
  A shrink;      // Qa . (Qa - Qb); 0 where the norm is clamped to epsilon, hence constant
  A factor;

  KD_HD A operator()(A own_value, A other_value) const {
    const A q = own * own_value;
    return factor * ((q - other * other_value) - shrink * q);
  }
};

template <typename A>
KD_HD MapSlope<A> map_slope(const MapPair& pair, double scale) {
  const double own = map_norm(pair.own), other = map_norm(pair.other);
  const bool clamped = std::sqrt(pair.own) < kMapEpsilon;
  const double shrink = pair.own / (own * own) - pair.cross / (own * other);
  return {A(1 / own), A(1 / other), A(clamped ? 0 : shrink), A(2 * scale / own)};
}

}  // namespace kdfast
