// Arithmetic of the gated nonlinearity, shared by both devices; no torch.
#pragma once

#include "arithmetic.h"

namespace kdfast {

// What is added to a standard deviation (not to the variance).
constexpr double kScaleEpsilon = 1e-5;

// The scale of a channel from the sums of its squared deviations and of the deviations themselves
// from a mean that is rounded; exactly 1 at one position.
template <typename A>
KD_HD A gate_scale(A squares, A deviations, int64_t positions) {
  if (positions == 1) return A(1);
  const A sum = squares - deviations * (deviations / A(positions));
  return std::sqrt(sum < 0 ? A(0) : sum / A(positions - 1)) + A(kScaleEpsilon);
}

// relu as torch has it: NaN stays NaN.
template <typename A>
KD_HD A rectified(A x) {
  return x < 0 ? A(0) : x;
}

}  // namespace kdfast
