// Small matrix products and transposes in registers: what Gram matrices and their gradients are made
// of. Everything has internal linkage; a file that includes this compiles its own copy.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/lanes.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kFarApart = 512;      // bytes between rows
constexpr int64_t kDepth = 256;          // products summed before they join the result

// 32 bytes of A: two or one registers, for which the compiler has the instructions of each clone.
template <typename A>
struct VectorOf {
  static constexpr int64_t kLanes = 32 / sizeof(A);
  typedef A Type __attribute__((vector_size(32)));
};
template <typename A>
constexpr int64_t kLanes = VectorOf<A>::kLanes;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// C[r][v] (+)= sum over k of a[r * a_row + k * a_step] * b[k * b_step + v] for R rows and V vectors
// of columns, all held in registers.
template <typename A, int R, int V>
KD_HD void multiply_block(int64_t depth, const A* __restrict__ a, int64_t a_row, int64_t a_step,
                          const A* __restrict__ b, int64_t b_step, A* __restrict__ c,
                          int64_t c_row, bool add) {
  using Vector = typename VectorOf<A>::Type;
  constexpr int64_t L = kLanes<A>;
  Vector sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vector right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&right[v], b + v * L, sizeof(Vector));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const A left = a[r * a_row];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* to = c + r * c_row + v * L;
      if (add) {
        Vector before;
        std::memcpy(&before, to, sizeof(Vector));
        sum[r][v] += before;
      }
      std::memcpy(to, &sum[r][v], sizeof(Vector));
    }
  }
}

template <typename A, int V>
KD_HD void multiply_columns(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_step,
                            const A* b, int64_t b_step, A* c, int64_t c_row, bool add) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    multiply_block<A, 4, V>(depth, a + row * a_row, a_row, a_step, b, b_step, c + row * c_row,
                            c_row, add);
  }
  for (; row < rows; ++row) {
    multiply_block<A, 1, V>(depth, a + row * a_row, a_row, a_step, b, b_step, c + row * c_row,
                            c_row, add);
  }
}

// C[r][v] (+)= sum over k of a[r * a_row + k * a_step] * b[k * b_step + v]; reads and writes no
// element beyond `columns`.
template <typename A>
KD_CLONES void multiply(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row,
                        int64_t a_step, const A* b, int64_t b_step, A* c, int64_t c_row,
                        bool add) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t count = std::min(kDepth, depth - start);
    const A* left = a + start * a_step;
    const A* right = b + start * b_step;
    const bool plus = add || start > 0;
    int64_t column = 0;
    // Rows of B far apart share few lines of the cache: two vectors of each are brought together.
    const bool gather = rows > 4 && b_step * int64_t(sizeof(A)) >= kFarApart;
    for (; column + 2 * L <= columns; column += 2 * L) {
      if (gather) {
        alignas(64) A panel[kDepth * 2 * L];
        for (int64_t k = 0; k < count; ++k) {
          std::memcpy(panel + k * 2 * L, right + k * b_step + column, 2 * L * sizeof(A));
        }
        multiply_columns<A, 2>(rows, count, left, a_row, a_step, panel, 2 * L, c + column, c_row,
                               plus);
        continue;
      }
      multiply_columns<A, 2>(rows, count, left, a_row, a_step, right + column, b_step, c + column,
                             c_row, plus);
    }
    for (; column + L <= columns; column += L) {
      multiply_columns<A, 1>(rows, count, left, a_row, a_step, right + column, b_step, c + column,
                             c_row, plus);
    }
    const int64_t rest = columns - column;
    if (rest == 0) continue;
    alignas(64) A last[kDepth * L] = {};
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t v = 0; v < rest; ++v) last[k * L + v] = right[k * b_step + column + v];
    }
    for (int64_t row = 0; row < rows; row += 4) {
      const int64_t some = std::min<int64_t>(4, rows - row);
      alignas(64) A block[4 * L];
      multiply_columns<A, 1>(some, count, left + row * a_row, a_row, a_step, last, L, block, L,
                             false);
      for (int64_t r = 0; r < some; ++r) {
        A* to = c + (row + r) * c_row + column;
        for (int64_t v = 0; v < rest; ++v) to[v] = plus ? to[v] + block[r * L + v] : block[r * L + v];
      }
    }
  }
}

// x[0] to x[L - 1] transposed as an L x L matrix, in log2(L) rounds that exchange ever larger blocks.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KD_SHUFFLE 1
#endif
#endif
#ifdef KD_SHUFFLE
KD_HD void transpose_block(VectorOf<float>::Type* x) {
  using Vector = VectorOf<float>::Type;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector a = x[i], b = x[i + 4];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const int i = k / 2 * 4 + k % 2;
    const Vector a = x[i], b = x[i + 2];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const Vector a = x[i], b = x[i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    x[i + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
}

KD_HD void transpose_block(VectorOf<double>::Type* x) {
  using Vector = VectorOf<double>::Type;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vector a = x[i], b = x[i + 2];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const Vector a = x[i], b = x[i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 4, 2, 6);
    x[i + 1] = __builtin_shufflevector(a, b, 1, 5, 3, 7);
  }
}
#endif

// to[v * to_row + u] = from[u * from_row + v]; the rows of `to` are filled with zeros up to `padded`.
template <typename A>
KD_CLONES void transpose(const A* __restrict__ from, int64_t from_row, int64_t rows,
                         int64_t columns, A* __restrict__ to, int64_t to_row, int64_t padded) {
  int64_t row = 0;
#ifdef KD_SHUFFLE
  using Vector = typename VectorOf<A>::Type;
  constexpr int64_t L = kLanes<A>;
  for (; row + L <= rows; row += L) {
    int64_t column = 0;
    for (; column + L <= columns; column += L) {
      Vector x[L];
#pragma GCC unroll 8
      for (int64_t i = 0; i < L; ++i) {
        std::memcpy(&x[i], from + (row + i) * from_row + column, sizeof(Vector));
      }
      transpose_block(x);
#pragma GCC unroll 8
      for (int64_t i = 0; i < L; ++i) {
        std::memcpy(to + (column + i) * to_row + row, &x[i], sizeof(Vector));
      }
    }
    for (; column < columns; ++column) {
      for (int64_t i = row; i < row + L; ++i) to[column * to_row + i] = from[i * from_row + column];
    }
  }
#endif
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * to_row + row] = from[row * from_row + column];
    }
  }
  for (; row < padded; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column * to_row + row] = A(0);
  }
}

// to[r * to_row + i] = from[r * from_row + i].
template <typename A, typename T>
KD_CLONES void widen_rows(const T* __restrict__ from, int64_t from_row, int64_t rows,
                          int64_t columns, A* __restrict__ to, int64_t to_row) {
  for (int64_t row = 0; row < rows; ++row, from += from_row, to += to_row) {
    for (int64_t i = 0; i < columns; ++i) to[i] = A(widen(from[i]));
  }
}

template <typename A, typename T>
KD_CLONES void narrow_row(const A* __restrict__ from, int64_t count, T* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow_to<T>(from[i]);
}

}  // namespace
}  // namespace kdfast::cpu
