// Kernels of the gated nonlinearity; no torch.
//
// NCHW: a warp owns a row, the positions of a channel of a sample, and reads it three times (mean,
// deviations, result), of which the caches serve two. channels_last: a block owns 32 channels of a
// sample, a lane a channel and a warp every eighth position. At one position a row is a sample and
// its scale 1. The gate's gradient leaves a number a block, which a second kernel adds up in order.
#pragma once

#include "cuda/device.cuh"
#include "transnet.h"

namespace kdfast::cuda {

constexpr int kGateThreads = 256;
constexpr int kGateWarps = kGateThreads / 32;
constexpr int kGateSumThreads = 1024;

// Two maps of one shape, dtype and memory format, and a dense result.
template <typename A>
struct GateTask {
  Feature first, hidden;
  void* out;
  A* scale;        // [samples, channels]
  const A* gate;   // one element
  int64_t length;  // of a row, NCHW
  int64_t rows;    // of a sample, NCHW
};

KD_HD int64_t gate_groups(int64_t channels) { return (channels + 31) / 32; }

template <typename T, int V>
__device__ __forceinline__ bool gate_packs_fit(const Feature& first, const Feature& hidden,
                                               const void* out, int64_t length) {
  const uint64_t addresses = reinterpret_cast<uint64_t>(first.data) |
                             reinterpret_cast<uint64_t>(hidden.data) |
                             reinterpret_cast<uint64_t>(out);
  return length % V == 0 && first.sample_stride % V == 0 && hidden.sample_stride % V == 0 &&
         addresses % 16 == 0;
}

// The scale of a row, in all lanes of the warp.
template <typename A, typename T, int V>
__device__ __forceinline__ A warp_scale(const T* x, int64_t length) {
  const int64_t first = int64_t(threadIdx.x % 32) * V;
  A mean = 0;
  for (int64_t i = first; i < length; i += 32 * V) {
    const Pack<T, V> pack = load_pack<T, V>(x + i);
#pragma unroll
    for (int v = 0; v < V; ++v) mean += A(widen(pack.element[v]));
  }
  mean = warp_sum(mean) / A(length);
  A sum = 0, square = 0;
  for (int64_t i = first; i < length; i += 32 * V) {
    const Pack<T, V> pack = load_pack<T, V>(x + i);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A deviation = A(widen(pack.element[v])) - mean;
      sum += deviation;
      square += deviation * deviation;
    }
  }
  return gate_scale(warp_sum(square), warp_sum(sum), length);
}

// The results of a row, forward or backward; returns the lane's part of the sum of grad *
// relu(hidden).
template <bool Backward, typename A, typename T, int V>
__device__ __forceinline__ A gate_row(const T* first, const T* hidden, A factor, int64_t length,
                                      T* out) {
  A sum = 0;
  for (int64_t i = int64_t(threadIdx.x % 32) * V; i < length; i += 32 * V) {
    const Pack<T, V> own = load_pack<T, V>(first + i), other = load_pack<T, V>(hidden + i);
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A value = A(widen(own.element[v])), h = A(widen(other.element[v]));
      if (Backward) {
        narrow(h > 0 ? factor * value : A(0), result.element[v]);
        sum += value * rectified(h);
      } else {
        narrow(value + factor * rectified(h), result.element[v]);
      }
    }
    store_pack(out + i, result);
  }
  return sum;
}

// NCHW. sums[block] = the block's part of the gate's gradient, backward.
template <bool Backward, typename A>
__global__ void __launch_bounds__(kGateThreads)
    gate_rows(const __grid_constant__ GateTask<A> task, A* sums) {
  __shared__ A scratch[kGateWarps];
  const int64_t row = int64_t(blockIdx.x) * kGateWarps + threadIdx.x / 32;
  const int64_t channels = task.first.channels, positions = task.first.positions;
  A sum = 0;
  if (row < task.first.samples * task.rows) {
    const int64_t sample = row / task.rows, at = row % task.rows * task.length;
    const A gate = *task.gate;
    with_storage<A>(task.first.storage, [&](auto element) {
      using T = decltype(element);
      constexpr int V = kVector<T>;
      const T* first =
          static_cast<const T*>(task.first.data) + sample * task.first.sample_stride + at;
      const T* hidden =
          static_cast<const T*>(task.hidden.data) + sample * task.hidden.sample_stride + at;
      T* out = static_cast<T*>(task.out) + sample * channels * positions + at;
      const bool packs = gate_packs_fit<T, V>(task.first, task.hidden, task.out, task.length);
      A scale = 1;
      if (Backward) {
        if (positions > 1) scale = task.scale[row];
      } else {
        if (positions > 1) {
          scale = packs ? warp_scale<A, T, V>(hidden, positions)
                        : warp_scale<A, T, 1>(hidden, positions);
          if (threadIdx.x % 32 == 0) task.scale[row] = scale;
        } else {
          for (int64_t c = threadIdx.x % 32; c < channels; c += 32) {
            task.scale[sample * channels + c] = scale;
          }
        }
      }
      const A factor = gate / scale;
      sum = packs ? gate_row<Backward, A, T, V>(first, hidden, factor, task.length, out)
                  : gate_row<Backward, A, T, 1>(first, hidden, factor, task.length, out);
      sum /= scale;
    });
  }
  if (Backward) {
    sum = block_sum<kGateThreads>(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

// Sum over the warps of the block, lane by lane, in all of them. `shared` holds a value a thread.
template <typename A>
__device__ __forceinline__ A lane_sum(A value, A* shared) {
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < kGateWarps; ++warp) sum += shared[warp * 32 + threadIdx.x % 32];
  return sum;
}

// channels_last, likewise.
template <bool Backward, typename A>
__global__ void __launch_bounds__(kGateThreads)
    gate_channels(const __grid_constant__ GateTask<A> task, A* sums) {
  __shared__ A shared[kGateThreads];
  __shared__ A scratch[kGateWarps];
  const int64_t channels = task.first.channels, positions = task.first.positions;
  const int64_t groups = gate_groups(channels), sample = int64_t(blockIdx.x) / groups;
  const int64_t channel = int64_t(blockIdx.x) % groups * 32 + threadIdx.x % 32;
  const int64_t start = threadIdx.x / 32;
  const int64_t count = channel < channels ? positions : 0;
  const A gate = *task.gate;
  A total = 0;
  with_storage<A>(task.first.storage, [&](auto element) {
    using T = decltype(element);
    const T* first =
        static_cast<const T*>(task.first.data) + sample * task.first.sample_stride + channel;
    const T* hidden =
        static_cast<const T*>(task.hidden.data) + sample * task.hidden.sample_stride + channel;
    T* out = static_cast<T*>(task.out) + sample * channels * positions + channel;
    A scale = 1;
    if (Backward) {
      if (channel < channels) scale = task.scale[sample * channels + channel];
    } else {
      A mean = 0;
#pragma unroll 4
      for (int64_t i = start; i < count; i += kGateWarps) mean += A(widen(hidden[i * channels]));
      mean = lane_sum(mean, shared) / A(positions);
      A sum = 0, square = 0;
#pragma unroll 4
      for (int64_t i = start; i < count; i += kGateWarps) {
        const A deviation = A(widen(hidden[i * channels])) - mean;
        sum += deviation;
        square += deviation * deviation;
      }
      sum = lane_sum(sum, shared);
      scale = gate_scale(lane_sum(square, shared), sum, positions);
      if (channel < channels && start == 0) task.scale[sample * channels + channel] = scale;
    }
    const A factor = gate / scale;
#pragma unroll 4
    for (int64_t i = start; i < count; i += kGateWarps) {
      const A value = A(widen(first[i * channels])), h = A(widen(hidden[i * channels]));
      if (Backward) {
        narrow(h > 0 ? factor * value : A(0), out[i * channels]);
        total += value * rectified(h);
      } else {
        narrow(value + factor * rectified(h), out[i * channels]);
      }
    }
    total /= scale;
  });
  if (Backward) {
    total = block_sum<kGateThreads>(total, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
  }
}

// One block: *out = the sum of `count` numbers.
template <typename A>
__global__ void __launch_bounds__(kGateSumThreads)
    gate_sum(const A* sums, int64_t count, A* out) {
  __shared__ A scratch[kGateSumThreads / 32];
  A sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kGateSumThreads) sum += sums[i];
  sum = block_sum<kGateSumThreads>(sum, scratch);
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace kdfast::cuda
