// A split weight and its redraw, shared by both devices; no torch.
#pragma once

#include "feature.h"
#include "philox.h"

namespace kdfast {

// A weight [rows, columns, inner] whose elements are numbered in this order; in memory inner comes
// before columns if `channels_last`. An element is kept if its row and its column are in a run, or
// if its bit is set.
struct SplitLayer {
  void* weight;
  const void* mask;  // int64 row runs, then column runs: (start, length) each; or packed bits
  double width;      // of the interval: 2 / sqrt(columns * inner)
  int64_t first_block;
  int32_t rows, columns, inner;
  int32_t row_runs, column_runs;  // row_runs -1: packed bits
  int16_t storage;
  int16_t channels_last;

  KD_HD bool packed() const { return row_runs < 0; }
  KD_HD const int64_t* runs() const { return static_cast<const int64_t*>(mask); }
  KD_HD bool bit(int64_t element) const {
    return (static_cast<const uint8_t*>(mask)[element / 8] >> (element % 8) & 1) != 0;
  }
  KD_HD int64_t elements() const { return int64_t(rows) * columns * inner; }
};

KD_HD bool in_runs(const int64_t* runs, int32_t count, int64_t at) {
  for (int32_t i = 0; i < count; ++i) {
    if (at >= runs[2 * i] && at < runs[2 * i] + runs[2 * i + 1]) return true;
  }
  return false;
}

// Uniform on [-width / 2, width / 2), rounded once.
template <typename A>
KD_HD A redrawn(uint32_t bits, A width) {
  return (A(uniform(bits)) - A(0.5)) * width;
}

}  // namespace kdfast
