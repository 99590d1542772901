// Block copies and bit masks of split networks; no torch.
//
// A copy moves whole units of 2 to 16 bytes, the largest that divides every run, gap, line and
// address, so one kernel serves all dtypes and both memory formats. A block of 256 threads is
// lanes (neighbouring units of a line) by slots (lines); a thread finds its run once and moves
// kUnroll lines, whose loads are in flight together. Each unit of the target is written once,
// copied or zero, each of the source read once.
#pragma once

#include "cuda/device.cuh"
#include "split.h"

namespace kdfast::cuda {

constexpr int kSplitThreads = 256;
constexpr int kSplitUnroll = 4;
constexpr int kMaxRuns = 64;  // of rows and of columns in one launch; the tables go by value

// Runs of the target in ascending order; none: everything stays where it is.
struct RunTable {
  int32_t source[kMaxRuns], target[kMaxRuns], length[kMaxRuns];
  int32_t count;
};

// The source of place `at`, -1 if nothing is copied there.
__device__ __forceinline__ int64_t source_of(const RunTable& runs, int64_t at) {
  int low = 0, high = runs.count;  // the last run that begins at or before `at`
  while (low < high) {
    const int middle = (low + high) / 2;
    if (runs.target[middle] <= at) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0) return -1;
  const int64_t offset = at - runs.target[low - 1];
  return offset < runs.length[low - 1] ? runs.source[low - 1] + offset : -1;
}

// Lines first_line to last_line and units first_unit to last_unit of each are written. Lengths
// are in units.
struct CopyTask {
  const void* source;
  void* target;
  int64_t source_sample;             // from one sample of the source to the next
  int64_t source_line, target_line;  // from one line to the next
  int64_t lines;                     // of a sample
  int64_t first_line, last_line;
  int64_t first_unit, last_unit;
  int32_t lanes;  // a power of two up to kSplitThreads
  RunTable rows, columns;
};

template <typename Unit>
__global__ void __launch_bounds__(kSplitThreads)
    split_copy_units(const __grid_constant__ CopyTask task) {
  const int64_t tiles = (task.last_unit - task.first_unit + task.lanes - 1) / task.lanes;
  const int64_t tile = int64_t(blockIdx.x) % tiles;
  const int slots = kSplitThreads / task.lanes;
  const int slot = int(threadIdx.x) / task.lanes;
  const int64_t unit = task.first_unit + tile * task.lanes + int(threadIdx.x) % task.lanes;
  if (unit >= task.last_unit) return;
  const int64_t column = source_of(task.columns, unit);
  const int64_t first =
      task.first_line + (int64_t(blockIdx.x) / tiles) * (slots * kSplitUnroll) + slot;
  Unit value[kSplitUnroll];
#pragma unroll
  for (int u = 0; u < kSplitUnroll; ++u) {
    value[u] = Unit{};
    const int64_t line = first + u * slots;
    if (column < 0 || line >= task.last_line) continue;
    const int64_t sample = line / task.lines;
    const int64_t row = task.rows.count == 0 ? sample : source_of(task.rows, sample);
    if (row < 0) continue;
    value[u] = static_cast<const Unit*>(task.source)[row * task.source_sample +
                                                     (line - sample * task.lines) *
                                                         task.source_line +
                                                     column];
  }
#pragma unroll
  for (int u = 0; u < kSplitUnroll; ++u) {
    const int64_t line = first + u * slots;
    if (line >= task.last_line) break;
    static_cast<Unit*>(task.target)[line * task.target_line + unit] = value[u];
  }
}

constexpr int kMaskEach = 4;  // weights of a thread, kSplitThreads apart

// out = weight where its bit is set, else 0. Sizes below 2^31.
template <typename From, typename To>
__global__ void __launch_bounds__(kSplitThreads)
    split_mask_weights(const __grid_constant__ Feature weight, const uint8_t* bits, To* out) {
  const uint32_t channels = uint32_t(weight.channels), positions = uint32_t(weight.positions);
  const uint32_t size = channels * positions, count = uint32_t(weight.samples) * size;
  const uint32_t first = blockIdx.x * (kSplitThreads * kMaskEach) + threadIdx.x;
  const From* data = static_cast<const From*>(weight.data);
  To value[kMaskEach];
#pragma unroll
  for (int u = 0; u < kMaskEach; ++u) {
    const uint32_t i = first + u * kSplitThreads;
    value[u] = To{};
    if (i >= count) continue;
    const uint32_t sample = i / size, place = i - sample * size;
    uint32_t bit = i;
    if (weight.channels_last) {
      const uint32_t position = place / channels;
      bit = sample * size + (place - position * channels) * positions + position;
    }
    To kept;
    narrow(widen(data[int64_t(sample) * weight.sample_stride + place]), kept);
    if ((bits[bit / 8] >> (bit % 8)) & 1) value[u] = kept;
  }
#pragma unroll
  for (int u = 0; u < kMaskEach; ++u) {
    const uint32_t i = first + u * kSplitThreads;
    if (i < count) out[i] = value[u];
  }
}

// A byte of bits a thread.
__global__ void __launch_bounds__(kSplitThreads)
    split_draw_bits(uint64_t key, int64_t count, uint32_t threshold, uint8_t* out) {
  const int64_t byte = int64_t(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (byte < (count + 7) / 8) out[byte] = drawn_bits(key, byte, count, threshold);
}

}  // namespace kdfast::cuda
