// Contrastive representation distillation: which samples are drawn, and what a score costs; shared
// by both devices, no torch.
#pragma once

#include "arithmetic.h"
#include "exp.h"
#include "philox.h"

namespace kdfast {

// ---- Draws

// A permutation of [0, size): a Feistel network on [0, rows) x [0, columns), whose cells are hardly
// more than `size` and as near to a square as can be (Black and Rogaway, "Ciphers with arbitrary
// finite domains", CT-RSA 2002). Sizes up to 2^31. Every value is found alone, in O(1) memory.
struct Permutation {
  static constexpr int kRounds = 6;

  uint32_t size, rows, columns;
  uint32_t key[kRounds];
};

// Place j of the permutation is cell (j / columns, j % columns).
struct Cell {
  uint32_t row, column;
};

KD_HD Permutation permutation_of(uint64_t key, uint64_t id, uint32_t size) {
  Permutation permutation{};
  permutation.size = size;
  permutation.rows = uint32_t(std::ceil(std::sqrt(double(size))));
  permutation.columns = (size + permutation.rows - 1) / permutation.rows;
  const Bits4 first = philox(key, counter_of(0, id, 0)), second = philox(key, counter_of(1, id, 0));
  for (int k = 0; k < 4; ++k) permutation.key[k] = first.word[k];
  for (int k = 4; k < Permutation::kRounds; ++k) permutation.key[k] = second.word[k - 4];
  return permutation;
}

// (a + random of (x, key)) mod size, for a < size <= 46341.
KD_HD uint32_t shifted(uint32_t a, uint32_t x, uint32_t key, uint32_t size) {
  uint32_t bits = (x ^ key) * 0x9E3779B9u;
  bits = (bits ^ (bits >> 15)) * 0xBB67AE85u;
  const uint32_t sum = a + (((bits >> 16) * size) >> 16);
  return sum - size < sum ? sum - size : sum;  // below `size` the difference wraps around
}

// One pass through the network; the cell may lie past `size`.
KD_HD Cell permuted(Cell cell, const Permutation& permutation) {
  for (int k = 0; k < Permutation::kRounds; k += 2) {
    cell.row = shifted(cell.row, cell.column, permutation.key[k], permutation.rows);
    cell.column = shifted(cell.column, cell.row, permutation.key[k + 1], permutation.columns);
  }
  return cell;
}

KD_HD uint32_t value_of(Cell cell, const Permutation& permutation) {
  return cell.row * permutation.columns + cell.column;
}

// The value of a cell that has been permuted once: cells past `size` go on until one is not.
KD_HD uint32_t walked(Cell cell, const Permutation& permutation) {
  uint32_t value = value_of(cell, permutation);
  while (value >= permutation.size) {
    cell = permuted(cell, permutation);
    value = value_of(cell, permutation);
  }
  return value;
}

// Draws with replacement: number j of [0, size) is word j % 4 of this block's bits, scaled. Blocks
// 0 and 1 are the permutation's.
KD_HD Bits4 replacement_bits(uint64_t key, uint64_t id, uint32_t block) {
  return philox(key, counter_of(block + 2, id, 0));
}
KD_HD uint32_t word_of(const Bits4& bits, uint32_t j) {
  const uint32_t low = j % 2 ? bits.word[1] : bits.word[0];
  return j % 4 < 2 ? low : (j % 2 ? bits.word[3] : bits.word[2]);
}
KD_HD uint32_t scaled(uint32_t bits, uint32_t size) {
  return uint32_t((uint64_t(bits) * size) >> 32);
}

// The samples of other classes, in the order that is sorted by class: all but [first, first + own).
struct Pool {
  uint32_t first, own, size;

  KD_HD uint32_t place(uint32_t value) const { return value + (value >= first ? own : 0u); }
};

// ---- Loss

constexpr double kContrastEpsilon = 1e-7;  // the published code's, in every denominator

// What is the same for all scores of one side. With log x = score / temperature - log Z and
// c = negatives / samples:
//
//   positive  -log(x / (x + c + eps))    slope in log x  -(c + eps) / (x + c + eps)
//   negative  -log(c / (x + c + eps))                     x / (x + c + eps)
template <typename A>
struct Contrast {
  A sharpness;  // 1 / temperature
  A log_z;
  A epsilon;
  A ratio;    // 1 / c
  A shifted;  // c + eps

  KD_HD A log_x(A score) const { return score * sharpness - log_z; }
  // A negative's loss is log(1 + this).
  KD_HD A odds(A x) const { return (x + epsilon) * ratio; }
  KD_HD A negative_slope(A x) const { return x / (x + shifted); }
  KD_HD A positive_slope(A x) const { return -shifted / (x + shifted); }
  KD_HD A positive_loss(A log_x) const {
    // exp(40) / eps is still a float, and 1 against exp(40) is nothing.
    return log_x < A(-40) ? std::log(shifted) - log_x : std::log1p(shifted * std::exp(-log_x));
  }
};

// With log_z left at 0, for Z = 1.
template <typename A>
KD_HD Contrast<A> contrast_of(double temperature, int64_t negatives, int64_t samples) {
  const double c = double(negatives) / double(samples);
  return {A(1 / temperature), A(0), A(kContrastEpsilon), A(1 / c), A(c + kContrastEpsilon)};
}

// Smallest norm that a bank row is divided by.
constexpr double kRowEpsilon = 1e-12;

}  // namespace kdfast
