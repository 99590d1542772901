// Contrastive representation distillation kernels; no torch.
//
// The loss reads every drawn bank row once and keeps it in registers: a warp takes eight rows, 16
// bytes of each a lane, forms the eight dot products, turns each into a loss and a slope, and adds
// slope * row to the gradient. A block does that for a tile of one sample's columns; a second
// kernel adds the tiles. Scores are never stored, and the banks stay in the second-level cache
// (25.6 MB each at 50,000 x 128). No atomics: every sum has a fixed order.
#pragma once

#include "contrast.h"
#include "cuda/device.cuh"

namespace kdfast::cuda {

constexpr int kContrastThreads = 256;
constexpr int kContrastWarps = kContrastThreads / 32;
constexpr int kTileColumns = 512;   // of the indices, of one block
constexpr int kTileDraws = 1024;    // of one block
constexpr int kRows = 8;            // of a bank, of one warp at a time
constexpr int kLaneFloats = 4;
constexpr int kRegisterDim = 32 * kLaneFloats;  // the longest rows that stay in registers
constexpr int kSlice = 512;         // elements of the gradient of one block, for other rows
constexpr int kContrastSumThreads = 1024;

// ---- Draws

// A block draws kTileDraws columns of one sample; the first one writes column 0, too.
__global__ void __launch_bounds__(kContrastThreads)
    negatives_drawn(const int64_t* labels, const int64_t* class_offsets, int64_t classes,
                    const int64_t* order, int64_t order_size, const int64_t* ids,
                    int64_t negatives, int64_t tiles, uint64_t key, int64_t* indices) {
  __shared__ Permutation shared;
  const int64_t sample = int64_t(blockIdx.x) / tiles, tile = int64_t(blockIdx.x) % tiles;
  const int64_t label = labels[sample], id = ids[sample];
  int64_t* row = indices + sample * (negatives + 1);
  Pool pool{0, 0, 0};
  if (label >= 0 && label < classes) {
    const int64_t first = class_offsets[label], own = class_offsets[label + 1] - first;
    pool = {uint32_t(first), uint32_t(own), uint32_t(class_offsets[classes] - own)};
  }
  if (threadIdx.x == 0) {
    if (pool.size > 0) shared = permutation_of(key, uint64_t(id), pool.size);
    if (tile == 0) row[0] = pool.size > 0 ? id : -1;
  }
  __syncthreads();
  const Permutation permutation = shared;
  const int64_t start = tile * kTileDraws, left = negatives - start;
  const int count = left < kTileDraws ? int(left) : kTileDraws;
  for (int k = threadIdx.x; k < count; k += kContrastThreads) {
    const uint32_t j = uint32_t(start + k);
    int64_t drawn = -1;
    if (pool.size > 0) {
      uint32_t value;
      if (negatives <= int64_t(pool.size)) {
        const Cell cell{j / permutation.columns, j % permutation.columns};
        value = walked(permuted(cell, permutation), permutation);
      } else {
        value = scaled(word_of(replacement_bits(key, uint64_t(id), j / 4), j), pool.size);
      }
      drawn = int64_t(pool.place(value));
      if (order != nullptr) drawn = drawn < order_size ? order[drawn] : -1;
    }
    row[1 + start + k] = drawn;
  }
}

// ---- Loss

// Everything of one side. The anchors [B, d] meet the other network's bank.
template <typename A>
struct ContrastSide {
  const A* anchors;
  const A* bank;
  const A* z;
};

template <typename A>
struct ContrastTask {
  ContrastSide<A> side[2];
  const int64_t* indices;  // [B, columns]
  int64_t batch, columns, dim, samples;
  int64_t tiles, slices;
  Contrast<A> contrast;
  bool slopes;
};

// Where a block works: block = ((side * batch + sample) * tiles + tile) * slices + slice.
struct ContrastPlace {
  int side, count;
  int64_t sample, slice, block, start;
};

template <typename A>
__device__ __forceinline__ ContrastPlace contrast_place(const ContrastTask<A>& task) {
  ContrastPlace place;
  place.slice = int64_t(blockIdx.x) % task.slices;
  place.block = int64_t(blockIdx.x) / task.slices;
  place.start = place.block % task.tiles * kTileColumns;
  const int64_t row = place.block / task.tiles, left = task.columns - place.start;
  place.sample = row % task.batch;
  place.side = int(row / task.batch);
  place.count = left < kTileColumns ? int(left) : kTileColumns;
  return place;
}

// The sums over all lanes of sum[0] to sum[7]: lane gets that of row lane / 4.
template <typename A>
__device__ __forceinline__ A sum_of_row(A (&sum)[kRows]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A given = upper ? sum[i] : sum[i + half];
      const A kept = upper ? sum[i + half] : sum[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * half);
    }
  }
  return warp_sum(sum[0], 4);
}

// Loss and x of a lane's row, added once per row, and its slope. Column 0 is the positive; a row
// that is no row of the bank makes all three NaN.
template <typename A>
__device__ __forceinline__ A slope_of(const Contrast<A>& contrast, A score, int64_t column,
                                      bool is_row, bool is_column, A& loss, A& sum) {
  const A log_x = is_row ? contrast.log_x(score) : A(NAN);
  const A x = std::exp(log_x);
  A cost, slope;
  if (column == 0) {
    cost = contrast.positive_loss(log_x);
    slope = contrast.positive_slope(x);
  } else {
    cost = std::log1p(contrast.odds(x));
    slope = contrast.negative_slope(x);
  }
  if (is_column && threadIdx.x % 4 == 0) {
    loss += cost;
    sum += x;
  }
  return is_column ? slope : A(0);
}

// Losses and x of the block's tile, into stats[block] = (loss, sum of x).
template <typename A>
__device__ __forceinline__ void write_stats(A loss, A sum, int64_t block, A* stats) {
  __shared__ A scratch[2][kContrastWarps];
  loss = block_sum<kContrastThreads>(loss, scratch[0]);
  sum = block_sum<kContrastThreads>(sum, scratch[1]);
  if (threadIdx.x == 0) {
    stats[2 * block] = loss;
    stats[2 * block + 1] = sum;
  }
}

// Rows of at most kRegisterDim floats, a multiple of four, aligned: from registers. partial
// [blocks, dim] is the tile's part of the gradient.
__global__ void __launch_bounds__(kContrastThreads, 3)
    contrast_tiles(const __grid_constant__ ContrastTask<float> task, float* stats,
                   float* partial) {
  __shared__ float gradients[kContrastWarps][kRegisterDim];
  const ContrastPlace place = contrast_place(task);
  const ContrastSide<float>& side = task.side[place.side];
  const int64_t* columns = task.indices + place.sample * task.columns + place.start;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool inside = lane * kLaneFloats < task.dim;
  using Lane = Pack<float, kLaneFloats>;
  Contrast<float> contrast = task.contrast;
  contrast.log_z = std::log(*side.z);

  const int64_t element = lane * kLaneFloats;
  Lane anchor{}, gradient{};
  if (inside) {
    anchor = load_pack<float, kLaneFloats>(side.anchors + place.sample * task.dim + element);
  }
  float loss = 0, sum = 0;
  for (int base = warp * kRows; base < place.count; base += kContrastWarps * kRows) {
    // Every lane reads the index of the row that its score will be of.
    const int own = base + lane / 4;
    const bool is_column = own < place.count;
    const int64_t index = is_column ? columns[own] : 0;
    const bool is_row = index >= 0 && index < task.samples;
    Lane row[kRows] = {};
    float product[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = __shfl_sync(0xffffffffu, is_row ? index : int64_t(-1), 4 * r);
      if (inside && from >= 0 && base + r < place.count) {
        row[r] = load_pack<float, kLaneFloats>(side.bank + from * task.dim + element);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      product[r] = 0;
#pragma unroll
      for (int v = 0; v < kLaneFloats; ++v) product[r] += row[r].element[v] * anchor.element[v];
    }
    const float score = sum_of_row(product);
    const float slope =
        slope_of(contrast, score, place.start + own, is_row, is_column, loss, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float factor = __shfl_sync(0xffffffffu, slope, 4 * r);
#pragma unroll
      for (int v = 0; v < kLaneFloats; ++v) gradient.element[v] += factor * row[r].element[v];
    }
  }
  write_stats(loss, sum, place.block, stats);
  if (!task.slopes) return;
  store_pack(&gradients[warp][element], gradient);
  __syncthreads();
  const int x = threadIdx.x;
  if (x < task.dim) {
    float total = 0;
    for (int w = 0; w < kContrastWarps; ++w) total += gradients[w][x];
    partial[place.block * task.dim + x] = total;
  }
}

// Any other rows: read twice, the second time from the first-level cache. Each block forms all
// scores of its tile and kSlice elements of the gradient, in dynamic shared memory
// [warps, kSlice].
template <typename A>
__global__ void __launch_bounds__(kContrastThreads)
    contrast_tiles_of_any(const __grid_constant__ ContrastTask<A> task, A* stats, A* partial) {
  DYNAMIC_SHARED(A, gradients);
  const ContrastPlace place = contrast_place(task);
  const ContrastSide<A>& side = task.side[place.side];
  const int64_t* columns = task.indices + place.sample * task.columns + place.start;
  const A* anchor = side.anchors + place.sample * task.dim;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = place.slice * kSlice;
  const int64_t end = task.dim < begin + kSlice ? task.dim : begin + kSlice;
  A* gradient = gradients + warp * kSlice;
  Contrast<A> contrast = task.contrast;
  contrast.log_z = std::log(*side.z);

  for (int x = lane; x < kSlice; x += 32) gradient[x] = 0;  // a lane reads what it wrote itself
  A loss = 0, sum = 0;
  for (int base = warp * kRows; base < place.count; base += kContrastWarps * kRows) {
    const int own = base + lane / 4;
    const bool is_column = own < place.count;
    const int64_t index = is_column ? columns[own] : 0;
    const bool is_row = index >= 0 && index < task.samples;
    const A* row[kRows];
    A product[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r] = side.bank + __shfl_sync(0xffffffffu, is_row ? index : int64_t(0), 4 * r) * task.dim;
    }
    for (int64_t x = lane; x < task.dim; x += 32) {
      const A factor = anchor[x];
#pragma unroll
      for (int r = 0; r < kRows; ++r) product[r] += row[r][x] * factor;
    }
    const A score = sum_of_row(product);
    const A slope = slope_of(contrast, score, place.start + own, is_row, is_column, loss, sum);
    A factor[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) factor[r] = __shfl_sync(0xffffffffu, slope, 4 * r);
    const int rows = place.count - base < kRows ? place.count - base : kRows;
    for (int64_t x = begin + lane; task.slopes && x < end; x += 32) {
      A total = gradient[x - begin];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) total += factor[r] * row[r][x];
      }
      gradient[x - begin] = total;
    }
  }
  if (place.slice == 0) write_stats(loss, sum, place.block, stats);
  if (!task.slopes) return;
  __syncthreads();
  for (int64_t x = begin + threadIdx.x; x < end; x += kContrastThreads) {
    A total = 0;
    for (int w = 0; w < kContrastWarps; ++w) total += gradients[w * kSlice + (x - begin)];
    partial[place.block * task.dim + x] = total;
  }
}

// Adds the tiles up. Blocks 0 to 2 * batch - 1 write the slopes of one sample of a side, when there
// are slopes; the last block writes the loss and the means of x.
template <typename A>
__global__ void __launch_bounds__(kContrastSumThreads)
    contrast_sum(const __grid_constant__ ContrastTask<A> task, const A* stats, const A* partial,
                 A scale, A* student_slope, A* teacher_slope, A* loss, A* mean) {
  const int64_t tiles = task.tiles, rows = task.slopes ? 2 * task.batch : 0;
  if (int64_t(blockIdx.x) < rows) {
    const int64_t row = blockIdx.x, sample = row % task.batch;
    A* slope = (row < task.batch ? student_slope : teacher_slope) + sample * task.dim;
    for (int64_t x = threadIdx.x; x < task.dim; x += kContrastSumThreads) {
      A total = 0;
#pragma unroll 8
      for (int64_t tile = 0; tile < tiles; ++tile) {
        total += partial[(row * tiles + tile) * task.dim + x];
      }
      slope[x] = scale * total;
    }
    return;
  }
  __shared__ A scratch[4][kContrastSumThreads / 32];
  A total = 0;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const A* from = stats + 2 * side * task.batch * tiles;
    A cost = 0, sum = 0;
    for (int64_t i = threadIdx.x; i < task.batch * tiles; i += kContrastSumThreads) {
      cost += from[2 * i];
      sum += from[2 * i + 1];
    }
    total += block_sum<kContrastSumThreads>(cost, scratch[2 * side]) / A(task.batch);
    sum = block_sum<kContrastSumThreads>(sum, scratch[2 * side + 1]);
    if (threadIdx.x == 0) mean[side] = sum / (A(task.batch) * A(task.columns));
  }
  if (threadIdx.x == 0) *loss = total;
}

// grad * slope, both sides; `count` elements each.
template <typename A>
__global__ void __launch_bounds__(kContrastThreads)
    contrast_scale(const A* grad, const A* student_slope, const A* teacher_slope, int64_t count,
                   A* student, A* teacher) {
  const int64_t i = int64_t(blockIdx.x) * kContrastThreads + threadIdx.x;
  if (i >= count) return;
  const A factor = *grad;
  student[i] = factor * student_slope[i];
  teacher[i] = factor * teacher_slope[i];
}

// ---- Bank update

// A warp a sample and side. Of equal indices the last one's warp works alone.
template <typename A>
__global__ void __launch_bounds__(kContrastThreads)
    contrast_blend(A* student_bank, A* teacher_bank, const A* student, const A* teacher,
                   const int64_t* index, int64_t batch, int64_t dim, int64_t samples,
                   A momentum) {
  const int64_t task = int64_t(blockIdx.x) * kContrastWarps + threadIdx.x / 32;
  if (task >= 2 * batch) return;
  const int lane = threadIdx.x % 32;
  const int64_t sample = task % batch, at = index[sample];
  bool again = at < 0 || at >= samples;
  for (int64_t i = sample + 1 + lane; i < batch; i += 32) again |= index[i] == at;
  if (__any_sync(0xffffffffu, again)) return;
  A* row = (task < batch ? student_bank : teacher_bank) + at * dim;
  const A* embedding = (task < batch ? student : teacher) + sample * dim;
  A square = 0;
  for (int64_t x = lane; x < dim; x += 32) {
    const A value = momentum * row[x] + (1 - momentum) * embedding[x];
    row[x] = value;
    square += value * value;
  }
  const A norm = std::sqrt(warp_sum(square));
  const A factor = 1 / (norm < A(kRowEpsilon) ? A(kRowEpsilon) : norm);
  for (int64_t x = lane; x < dim; x += 32) row[x] *= factor;
}

}  // namespace kdfast::cuda
