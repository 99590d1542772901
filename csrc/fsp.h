// Feature maps as a Gram matrix sees them; no torch.
#pragma once

#include "arithmetic.h"
#include "feature.h"

namespace kdfast {

// A feature map on a grid: each position of the grid is a window of rows x columns positions of the
// feature (1 x 1: the feature itself). Windows neither overlap nor leave anything out.
struct Grid {
  Feature feature;
  int64_t width;      // of the grid
  int64_t positions;  // of the grid
  int64_t rows;
  int64_t columns;

  KD_HD bool pooled() const { return rows * columns > 1; }
  KD_HD int64_t window() const { return rows * columns; }
  KD_HD int64_t feature_width() const { return width * columns; }
  // The feature's first position in the window of a grid position.
  KD_HD int64_t corner(int64_t position) const {
    return (position / width) * rows * feature_width() + (position % width) * columns;
  }
};

// Whether `value` replaces the maximum so far: the first of equal values stays, NaN wins, and the
// last NaN of several.
template <typename A>
KD_HD bool replaces(A value, A maximum) {
  return value > maximum || value != value;
}

}  // namespace kdfast
