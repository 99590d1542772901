// Soft targets and cross-entropy, rows of logits; no torch.
//
// A row belongs to a warp (up to 256 classes), to a block of 256 threads (up to 4096), or to one of
// 1024, of which one fills a multiprocessor, so that the rows in flight stay in the caches: the
// maximum, the sums and the slopes each take a pass over the row, of which the first reads memory.
// Passes rather than one pass with running maxima: nothing has to be rescaled, and no two empty
// halves (-inf and -inf) are ever merged.
//
// Sums of one thread are float, and double across threads and in what follows them, a few numbers a
// row: KL is a small difference of sums, which float rounding would show in.
#pragma once

#include "cuda/device.cuh"
#include "logits.h"

namespace kdfast::cuda {

constexpr int kScaleThreads = 256;
constexpr int kLossThreads = 1024;
constexpr int kWarpClasses = 256;
constexpr int kBlockClasses = 4096;

// Threads a row and threads a block.
template <int G>
constexpr int kRowBlock = G == 32 ? 256 : G;
template <int G>
constexpr int kRowsPerBlock = kRowBlock<G> / G;
// Blocks a multiprocessor must hold: 4 of 256 threads leave each 64 registers, 3 leave 80.
template <typename A, int G>
constexpr int kRowBlocks = G == 1024 ? 1 : sizeof(A) == sizeof(double) ? 2 : G == 32 ? 4 : 3;

struct LogitsTable {
  const void* student;         // [rows, classes]
  const void* teacher;         // [members, rows, classes]
  const int64_t* indices;      // [rows], or null
  const void* probabilities;   // [rows, classes] of A, or null
  void* student_slope;         // [rows, classes], or null
  void* teacher_slope;         // [members, rows, classes], or null
  double* losses;              // [rows]
  int64_t rows;
  int64_t classes;
  bool packs;                  // whether all rows are 16-byte aligned
  LogitsWeights weights;
};

// What the slopes need to know of a teacher's row.
template <typename A>
struct MemberRow {
  A largest;
  A weight;  // of its exp in the slope; 0 for a member that is left out
  A mean;
};

__device__ __forceinline__ float exp_scaled(float d, float scale) { return exp2f(d * scale); }
__device__ __forceinline__ double exp_scaled(double d, double scale) { return exp2(d * scale); }

// Sums of N values over the G threads of a row, in all of them. Barriers are the block's: every
// thread of it must call. Two calls in a row need two different `scratch`, each [N * 32].
template <int G, int N>
__device__ __forceinline__ void row_sums(double (&values)[N], double* scratch) {
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = warp_sum(values[n]);
  if constexpr (G > 32) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) scratch[n * 32 + threadIdx.x / 32] = values[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int warp = 0; warp < G / 32; ++warp) sum += scratch[n * 32 + warp];
      values[n] = sum;
    }
  }
}

template <int G, typename A>
__device__ __forceinline__ A row_max(A value, A* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  if constexpr (G > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < G / 32; ++warp) {
      value = scratch[warp] > value ? scratch[warp] : value;
    }
  }
  return value;
}

// Calls f(x) for this thread's elements of a row.
template <typename A, typename T, int V, int G, typename F>
__device__ __forceinline__ void for_row(const T* row, int classes, const F& f) {
#pragma unroll(G == 1024 ? 1 : 4)
  for (int i = int(threadIdx.x % G) * V; i < classes; i += G * V) {
    const Pack<T, V> pack = load_pack<T, V>(row + i);
#pragma unroll
    for (int v = 0; v < V; ++v) f(A(widen(pack.element[v])));
  }
}

// Calls f(x, y) for this thread's elements of two rows.
template <typename A, typename T, int V, int G, typename F>
__device__ __forceinline__ void for_rows(const T* first, const T* second, int classes,
                                         const F& f) {
#pragma unroll(G == 1024 ? 1 : 2)
  for (int i = int(threadIdx.x % G) * V; i < classes; i += G * V) {
    const Pack<T, V> a = load_pack<T, V>(first + i), b = load_pack<T, V>(second + i);
#pragma unroll
    for (int v = 0; v < V; ++v) f(A(widen(a.element[v])), A(widen(b.element[v])));
  }
}

// One row by G threads. `members` is this row's part of the block's shared memory. Threads of a
// block without a row of their own repeat the last one and write nothing (`active`).
template <typename A, typename T, int V, int G>
__device__ __forceinline__ void logits_row(const LogitsTable& table, int64_t row, bool active,
                                           MemberRow<A>* members, double (*sums_scratch)[3 * 32],
                                           A (*max_scratch)[32]) {
  const int classes = int(table.classes);
  const LogitsWeights& weights = table.weights;
  const T* s = static_cast<const T*>(table.student) + row * table.classes;
  const A lowest = -A(INFINITY);
  const A scale = A(1.4426950408889634 / weights.temperature), hard_scale = A(1.4426950408889634);
  const A inverse = A(1 / weights.temperature);
  const bool hard = weights.gamma != 0, soft = weights.any_divergence();
  const bool first_lane = threadIdx.x % G == 0;

  A largest = lowest;
  for_row<A, T, V, G>(s, classes, [&](A x) { largest = x > largest ? x : largest; });
  largest = row_max<G>(largest, max_scratch[0]);

  // Sums of exp(d) and exp(d / T), and of d where labels are smoothed.
  A hard_part = 0, soft_part = 0, all_part = 0;
  for_row<A, T, V, G>(s, classes, [&](A x) {
    const A d = x - largest;
    if (hard) hard_part += exp_scaled(d, hard_scale);
    if (soft) soft_part += exp_scaled(d, scale);
    if (weights.smoothing != 0) all_part += d;
  });
  double sums[3] = {double(hard_part), double(soft_part), double(all_part)};
  row_sums<G>(sums, sums_scratch[0]);
  const double hard_sum = hard ? sums[0] : 1, soft_sum = soft ? sums[1] : 1;

  double loss = 0, label_total = 0;
  int label = -1;
  const A* probabilities = nullptr;
  if (hard) {
    LabelSums labels{1, 0, sums[2]};
    if (table.indices) {
      const int64_t index = table.indices[row];
      const bool known = index >= 0 && index < classes;
      if (known) label = int(index);
      labels.along = known ? double(A(widen(s[label])) - largest) : double(NAN);
      labels.total = known ? 1 : double(NAN);  // also makes the slopes NaN
    } else {
      probabilities = static_cast<const A*>(table.probabilities) + row * table.classes;
      double parts[2] = {0, 0};
      for (int i = threadIdx.x % G; i < classes; i += G) {
        const A y = probabilities[i];
        parts[0] += double(y);
        if (y != A(0)) parts[1] += double(y) * double(A(widen(s[i])) - largest);
      }
      row_sums<G>(parts, sums_scratch[1]);
      labels.total = parts[0];
      labels.along = parts[1];
    }
    label_total = labels.total;
    loss = weights.gamma * cross_entropy(labels, log(hard_sum), weights.smoothing, classes);
  }

  const StudentSlope<A> slope = student_slope<A>(weights, soft ? weights.sum() : 0, hard_sum,
                                                 soft_sum, label_total, classes);

  const int member_count = int(weights.members);
  for (int j = 0; j < member_count; ++j) {
    // The table is the same for the whole block, so barriers are met by all.
    if (weights.alpha[j] == 0) {
      if (first_lane) members[j] = {A(0), A(0), A(0)};
      continue;
    }
    const T* t = static_cast<const T*>(table.teacher) + (j * table.rows + row) * table.classes;
    A top = lowest;
    for_row<A, T, V, G>(t, classes, [&](A x) { top = x > top ? x : top; });
    top = row_max<G>(top, max_scratch[1]);
    A sum_part = 0, cross_part = 0;
    for_rows<A, T, V, G>(t, s, classes, [&](A x, A y) {
      const A d = x - top, e = exp_scaled(d, scale);
      sum_part += e;
      cross_part += e == A(0) ? A(0) : e * (d - (y - largest));
    });
    double parts[2] = {double(sum_part), double(cross_part)};
    row_sums<G>(parts, sums_scratch[1]);
    const double sum = parts[0], mean = parts[1] / sum;
    double value = divergence(mean, log(sum / soft_sum), weights.temperature);
    // All threads of a row hold the same sums; where a warp has a row, there is no barrier inside.
    if (needs_excess(value, classes)) {
      const A middle = A(mean), level = A(exp(mean / weights.temperature));
      A part = 0;
      for_rows<A, T, V, G>(t, s, classes, [&](A x, A y) {
        const A d = x - top, own = y - largest;
        part += excess(exp_scaled(d, scale), exp_scaled(own, scale),
                       ((d - own) - middle) * inverse, level);
      });
      double total[1] = {double(part)};
      row_sums<G>(total, sums_scratch[0]);
      value = log1p(total[0] / sum);
    }
    loss += weights.temperature * weights.temperature * weights.alpha[j] * value;
    if (first_lane) members[j] = {top, A(member_weight(weights, j, sum)), A(mean)};
  }
  if (first_lane && active) table.losses[row] = loss;
  if (!table.student_slope && !table.teacher_slope) return;
  __syncthreads();  // members
  if (!active) return;

  T* out = static_cast<T*>(table.student_slope);
  T* teacher_out = static_cast<T*>(table.teacher_slope);
  for (int i = int(threadIdx.x % G) * V; i < classes; i += G * V) {
    const Pack<T, V> pack = load_pack<T, V>(s + i);
    A own[V], slopes[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      own[v] = A(widen(pack.element[v])) - largest;
      slopes[v] = -slope.base;
      if (hard) slopes[v] += slope.hard * exp_scaled(own[v], hard_scale);
      if (soft) slopes[v] += slope.soft * exp_scaled(own[v], scale);
      if (i + v == label) slopes[v] -= slope.label;
    }
    if (probabilities) {
#pragma unroll
      for (int v = 0; v < V; ++v) slopes[v] -= slope.label * probabilities[i + v];
    }
    for (int j = 0; j < member_count; ++j) {
      const MemberRow<A> member = members[j];
      const int64_t offset = (j * table.rows + row) * table.classes + i;
      Pack<T, V> theirs = {};
      const bool kept = weights.alpha[j] != 0;
      if (kept) theirs = load_pack<T, V>(static_cast<const T*>(table.teacher) + offset);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A e = 0, own_slope = 0;
        if (kept) {
          const A d = A(widen(theirs.element[v])) - member.largest;
          e = exp_scaled(d, scale);
          slopes[v] -= member.weight * e;
          own_slope = member.weight * inverse * e;
          if (e != A(0)) own_slope *= (d - own[v]) - member.mean;
        }
        narrow(own_slope, theirs.element[v]);
      }
      if (teacher_out) store_pack(teacher_out + offset, theirs);
    }
    if (out) {
      Pack<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) narrow(slopes[v], result.element[v]);
      store_pack(out + row * table.classes + i, result);
    }
  }
}

template <typename A, typename T, int G>
__global__ void __launch_bounds__(kRowBlock<G>, kRowBlocks<A, G>)
    logits_rows(const __grid_constant__ LogitsTable table) {
  DYNAMIC_SHARED(MemberRow<A>, members);
  __shared__ double sums_scratch[2][3 * 32];
  __shared__ A max_scratch[2][32];
  const int slot = threadIdx.x / G;
  const int64_t own = int64_t(blockIdx.x) * kRowsPerBlock<G> + slot;
  const bool active = own < table.rows;
  const int64_t row = active ? own : table.rows - 1;
  MemberRow<A>* mine = members + slot * table.weights.members;
  // In a warp's short row 16 bytes a lane would leave lanes idle.
  if (G > 32 && table.packs) {
    logits_row<A, T, G == 32 ? 1 : kVector<T>, G>(table, row, active, mine, sums_scratch, max_scratch);
  } else {
    logits_row<A, T, 1, G>(table, row, active, mine, sums_scratch, max_scratch);
  }
}

// One block: the mean over rows.
template <typename A>
__global__ void __launch_bounds__(kLossThreads)
    logits_mean(const double* losses, int64_t rows, A* loss) {
  __shared__ double scratch[kLossThreads / 32];
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kLossThreads) sum += losses[row];
  sum = block_sum<kLossThreads>(sum, scratch);
  if (threadIdx.x == 0) *loss = A(sum / double(rows));
}

template <typename A, typename T, int V>
__device__ __forceinline__ void scale_packs(const T* from, int64_t count, A factor, T* to) {
  const int64_t stride = int64_t(gridDim.x) * kScaleThreads * V;
  int64_t i = (int64_t(blockIdx.x) * kScaleThreads + threadIdx.x) * V;
  for (; i < count; i += stride) {
    Pack<T, V> pack = load_pack<T, V>(from + i);
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(factor * A(widen(pack.element[v])), pack.element[v]);
    store_pack(to + i, pack);
  }
}

// to = from * grad * unit; grad is a scalar on the device.
template <typename A, typename T>
__global__ void __launch_bounds__(kScaleThreads)
    logits_scale(const T* from, int64_t count, const A* grad, double unit, bool packs, T* to) {
  const A factor = A(double(*grad) * unit);
  if (packs) {
    scale_packs<A, T, kVector<T>>(from, count, factor, to);
  } else {
    scale_packs<A, T, 1>(from, count, factor, to);
  }
}

}  // namespace kdfast::cuda
