// Redrawing split weights; no torch. Up to 64 layers a launch; a thread owns four neighbouring
// elements at a time, one counter, and writes 16 bytes of floats where none of them is kept.
#pragma once

#include "cuda/device.cuh"
#include "split_reset.h"

namespace kdfast::cuda {

constexpr int kResetThreads = 256;
constexpr int kResetSteps = 4;  // counters a thread
constexpr int kResetLayers = 64;
constexpr int64_t kResetTile = int64_t(4) * kResetThreads * kResetSteps;

// By value within the 4 KB that kernel parameters may have.
struct ResetTable {
  SplitLayer layer[kResetLayers];
  int64_t first_layer;
  int64_t count;
};
static_assert(sizeof(ResetTable) <= 4080);

template <typename A, typename T>
__device__ __forceinline__ void reset_four(const SplitLayer& layer, uint64_t key, uint64_t number,
                                           uint32_t element) {
  const uint32_t elements = uint32_t(layer.elements());
  const uint32_t length = uint32_t(layer.columns) * uint32_t(layer.inner);
  uint32_t row = element / length;
  uint32_t column = (element - row * length) / uint32_t(layer.inner);
  uint32_t i = element - row * length - column * uint32_t(layer.inner);
  int32_t place[4];  // -1: kept
  int reset = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    place[k] = -1;
    if (element + k < elements) {
      bool kept;
      if (layer.packed()) {
        kept = layer.bit(element + k);
      } else {
        kept = in_runs(layer.runs(), layer.row_runs, row) &&
               in_runs(layer.runs() + 2 * layer.row_runs, layer.column_runs, column);
      }
      if (!kept) {
        place[k] = int32_t(layer.channels_last
                               ? row * length + i * uint32_t(layer.columns) + column
                               : element + k);
        ++reset;
      }
    }
    if (++i == uint32_t(layer.inner)) {
      i = 0;
      if (++column == uint32_t(layer.columns)) {
        column = 0;
        ++row;
      }
    }
  }
  if (reset == 0) return;
  const Bits4 bits = philox(key, counter_of(element / 4, number, 0));
  Pack<T, 4> drawn;
#pragma unroll
  for (int k = 0; k < 4; ++k) narrow(redrawn(bits.word[k], A(layer.width)), drawn.element[k]);
  T* weight = static_cast<T*>(layer.weight);
  const bool aligned = reinterpret_cast<uint64_t>(weight) % (4 * sizeof(T)) == 0;
  if (reset == 4 && !layer.channels_last && aligned) {
    store_pack(weight + element, drawn);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (place[k] >= 0) weight[place[k]] = drawn.element[k];
  }
}

__global__ void __launch_bounds__(kResetThreads)
    split_reset(const __grid_constant__ ResetTable table, uint64_t key) {
  int low = 0, high = int(table.count) - 1;  // the layer of this block lies in [low, high]
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.layer[middle].first_block <= int64_t(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const SplitLayer& layer = table.layer[low];
  const uint32_t first = (blockIdx.x - uint32_t(layer.first_block)) * uint32_t(kResetTile);
  const auto tile = [&](auto zero) {
    using A = decltype(zero);
    with_storage<A>(Storage(layer.storage), [&](auto element) {
#pragma unroll 1
      for (int step = 0; step < kResetSteps; ++step) {
        const uint32_t at = first + 4 * (step * kResetThreads + threadIdx.x);
        if (at < uint32_t(layer.elements())) {
          reset_four<A, decltype(element)>(layer, key, uint64_t(table.first_layer + low), at);
        }
      }
    });
  };
  if (Storage(layer.storage) == Storage::kDouble) {
    tile(double{});
  } else {
    tile(float{});
  }
}

}  // namespace kdfast::cuda
