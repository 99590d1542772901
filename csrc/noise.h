// Sizes of the noise ops, shared by both devices; no torch.
#pragma once

#include "arithmetic.h"

namespace kdfast {

// Rows of noise: row (n, s) has `elements` = channels * height * width numbers and the counters
// (element / 4, ids[n] or n, first_sample + s).
struct NoiseShape {
  int64_t images, samples, channels, height, width, grid;
  int64_t elements;
  uint32_t first_sample;
  uint64_t key;
  const int64_t* ids;

  KD_HD uint64_t id(int64_t image) const { return uint64_t(ids ? ids[image] : image); }
};

// Images have at most kMostPixels rows and columns and 2^32 elements: index arithmetic in 32 bits.
constexpr int64_t kMostPixels = 65535;

// The cell of pixel i of `size` on a grid of `grid`, as in torch's nearest up-sampling.
KD_HD uint32_t cell_of(int64_t i, int64_t grid, int64_t size) {
  return uint32_t(i) * uint32_t(grid) / uint32_t(size);
}

// The first pixel of a cell.
KD_HD uint32_t first_of(int64_t cell, int64_t grid, int64_t size) {
  return (uint32_t(cell) * uint32_t(size) + uint32_t(grid) - 1) / uint32_t(grid);
}

}  // namespace kdfast
