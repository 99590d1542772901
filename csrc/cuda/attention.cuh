// Attention map kernels; no torch.
//
// A block of 256 threads owns one sample and a tile of 128 positions, for all channels:
//
//   NCHW           thread = (group, row): 16 bytes of neighbouring positions, channels row, row + K
//   channels_last  thread = (slot, lane): positions slot, slot + S, 16 bytes of channels a lane
//
// so both read whole 32-byte sectors, each element once. Sizes that 16 bytes do not divide, and
// unaligned slices, take the same path with one element a load. A forward block leaves its tile of
// both maps and the three products s.s, t.t, s.t (in double, see MapPair) and a second, small
// kernel adds them up; a backward block turns the products into the slope of each of its positions
// and writes F * slope. No atomics: every sum has a fixed order.
#pragma once

#include "cuda/device.cuh"

namespace kdfast::cuda {

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kMaxPairs = 16;     // of one launch; the tables are passed by value
constexpr int kSumThreads = 1024;

// Independent 16-byte loads in flight a thread. pow is long and far slower than its load.
template <int P>
constexpr int kUnroll = P == 0 ? 1 : 4;

// Blocks a multiprocessor must hold: 4 leave 64 registers a thread; pow needs more.
template <int P>
constexpr int kBlocks = P == 0 ? 3 : 4;

// Dynamic shared memory of the tile kernels, in elements of A: one V-wide partial sum a thread
// (at most 8 floats or 2 doubles), then two maps.
template <typename A>
constexpr int kPartials = kThreads * (sizeof(A) == sizeof(double) ? 2 : 8);
template <typename A>
constexpr size_t kMapsShared = (kPartials<A> + 2 * kTile) * sizeof(A);
template <typename A>
constexpr size_t kSlopesShared = kTile * sizeof(A);

KD_HD int64_t tiles_of(int64_t positions) { return (positions + kTile - 1) / kTile; }

// Features side by side: student and teacher, or one alone (`sides` 1). Blocks first_block to
// first_block + samples * tiles_of(positions) are theirs.
template <typename A>
struct MapTask {
  Feature feature[2];
  A* maps;  // [sides, samples, positions]
  int64_t first_block;
  int64_t positions;
  int sides;
};

template <typename A>
struct MapTable {
  MapTask<A> task[kMaxPairs];
  int count;
};

// One gradient. own and other are [samples, positions], products [samples, 3]; own_index is the
// column of own.own in it (0 student, 1 teacher).
template <typename A>
struct SlopeTask {
  Feature feature;
  void* gradient;
  const A* own;
  const A* other;
  const double* products;
  int64_t first_block;
  int64_t positions;
  int own_index;
};

template <typename A>
struct SlopeTable {
  SlopeTask<A> task[kMaxPairs];
  int count;
};

// Where a block works.
struct Place {
  int64_t sample;
  int64_t start;  // first position of the tile
  int count;      // positions in the tile
};

__device__ __forceinline__ Place place_of(int64_t block, int64_t positions) {
  const int64_t tiles = tiles_of(positions);
  const int64_t start = (block % tiles) * kTile, left = positions - start;
  return {block / tiles, start, left < kTile ? int(left) : kTile};
}

// The task of a table that this block belongs to.
template <typename Table>
__device__ __forceinline__ const auto& find_task(const Table& table) {
  int task = table.count - 1;
  while (task > 0 && table.task[task].first_block > int64_t(blockIdx.x)) --task;
  return table.task[task];
}

// Whether every V-wide pack along the dense dimension is aligned and whole.
template <typename T, int V>
__device__ __forceinline__ bool packs_fit(const Feature& feature, const void* other) {
  const int64_t dense = feature.channels_last ? feature.channels : feature.positions;
  const uint64_t addresses =
      reinterpret_cast<uint64_t>(feature.data) | reinterpret_cast<uint64_t>(other);
  return dense % V == 0 && feature.sample_stride % V == 0 && addresses % 16 == 0;
}

// mean[i] = mean over channels of |F|^p at position start + i. All threads take part; `mean` is
// complete after the caller's next barrier.
template <typename T, int V, int P, typename A>
__device__ __forceinline__ void tile_mean(const Feature& feature, const Place& place, A power,
                                          A* partial, A* mean) {
  const T* x = static_cast<const T*>(feature.data) + place.sample * feature.sample_stride;
  const int64_t channels = feature.channels;
  const int thread = threadIdx.x;
  if (!feature.channels_last) {
    const int64_t positions = feature.positions;
    const int groups = power_of_two((place.count + V - 1) / V, kTile / V);
    const int rows = kThreads / groups;
    const int group = thread % groups, row = thread / groups;
    A sum[V] = {};
    if (group * V < place.count) {
      const T* column = x + place.start + group * V;
      int64_t channel = row;
      for (; channel + (kUnroll<P> - 1) * rows < channels; channel += kUnroll<P> * rows) {
        Pack<T, V> pack[kUnroll<P>];
#pragma unroll
        for (int u = 0; u < kUnroll<P>; ++u) {
          pack[u] = load_pack<T, V>(column + (channel + u * rows) * positions);
        }
#pragma unroll
        for (int u = 0; u < kUnroll<P>; ++u) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += energy<P>(A(widen(pack[u].element[v])), power);
        }
      }
      for (; channel < channels; channel += rows) {
        const Pack<T, V> pack = load_pack<T, V>(column + channel * positions);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += energy<P>(A(widen(pack.element[v])), power);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) partial[row * (groups * V) + group * V + v] = sum[v];
    __syncthreads();
    if (thread < place.count) {
      A total = 0;
      for (int r = 0; r < rows; ++r) total += partial[r * (groups * V) + thread];
      mean[thread] = total / A(channels);
    }
    return;
  }
  const int lanes = power_of_two((channels + V - 1) / V, 32);
  const int slots = kThreads / lanes;
  const int lane = thread % lanes, slot = thread / lanes;
  // The loop bound is the same for the whole block: shuffles need every lane.
  for (int base = 0; base < place.count; base += kUnroll<P> * slots) {
    A sum[kUnroll<P>] = {};
    for (int64_t channel = int64_t(lane) * V; channel < channels; channel += int64_t(lanes) * V) {
      Pack<T, V> pack[kUnroll<P>] = {};
#pragma unroll
      for (int u = 0; u < kUnroll<P>; ++u) {
        const int position = base + u * slots + slot;
        if (position < place.count) {
          pack[u] = load_pack<T, V>(x + (place.start + position) * channels + channel);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll<P>; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[u] += energy<P>(A(widen(pack[u].element[v])), power);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll<P>; ++u) {
      const A total = warp_sum(sum[u], lanes);
      const int position = base + u * slots + slot;
      if (lane == 0 && position < place.count) mean[position] = total / A(channels);
    }
  }
}

// Tiles of the maps and, per block, products[block] = (s.s, t.t, s.t) over its tile.
template <typename A, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    attention_maps(const __grid_constant__ MapTable<A> table, A power, double* products) {
  DYNAMIC_SHARED(A, shared);
  __shared__ double scratch[3][kThreads / 32];
  const MapTask<A>& task = find_task(table);
  const Place place = place_of(int64_t(blockIdx.x) - task.first_block, task.positions);
  A* partial = shared;
  A* mean = shared + kPartials<A>;  // [2, kTile]

#pragma unroll 1
  for (int side = 0; side < task.sides; ++side) {
    const Feature& feature = task.feature[side];
    with_storage<A>(feature.storage, [&](auto element) {
      using T = decltype(element);
      if (packs_fit<T, kVector<T>>(feature, nullptr)) {
        tile_mean<T, kVector<T>, P>(feature, place, power, partial, mean + side * kTile);
      } else {
        tile_mean<T, 1, P>(feature, place, power, partial, mean + side * kTile);
      }
    });
    __syncthreads();
  }

  double own = 0, other = 0, cross = 0;
  if (int(threadIdx.x) < place.count) {
    const int64_t at = place.sample * task.positions + place.start + threadIdx.x;
    const A s = mean[threadIdx.x];
    task.maps[at] = s;
    own = double(s) * double(s);
    if (task.sides == 2) {
      const A t = mean[kTile + threadIdx.x];
      task.maps[task.feature[0].samples * task.positions + at] = t;
      other = double(t) * double(t);
      cross = double(s) * double(t);
    }
  }
  own = block_sum<kThreads>(own, scratch[0]);
  other = block_sum<kThreads>(other, scratch[1]);
  cross = block_sum<kThreads>(cross, scratch[2]);
  if (threadIdx.x == 0) {
    products[3 * int64_t(blockIdx.x)] = own;
    products[3 * int64_t(blockIdx.x) + 1] = other;
    products[3 * int64_t(blockIdx.x) + 2] = cross;
  }
}

// One block: the products of every pair and sample from those of the tiles, and the loss, added to
// *loss when `add`. tile_products [blocks, 3], products [pairs, samples, 3].
template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    attention_loss_sum(const __grid_constant__ MapTable<A> table, const double* tile_products,
                       double* products, A* loss, bool add) {
  __shared__ double scratch[kSumThreads / 32];
  double sum = 0;
  for (int pair = 0; pair < table.count; ++pair) {
    const MapTask<A>& task = table.task[pair];
    const int64_t samples = task.feature[0].samples, tiles = tiles_of(task.positions);
    const double scale = 1 / (double(samples) * double(task.positions));
    for (int64_t sample = threadIdx.x; sample < samples; sample += kSumThreads) {
      const double* from = tile_products + 3 * (task.first_block + sample * tiles);
      double own = 0, other = 0, cross = 0;
#pragma unroll 4
      for (int64_t tile = 0; tile < tiles; ++tile, from += 3) {
        own += from[0];
        other += from[1];
        cross += from[2];
      }
      double* to = products + 3 * (pair * samples + sample);
      to[0] = own;
      to[1] = other;
      to[2] = cross;
      sum += scale * map_distance({own, other, cross});
    }
  }
  sum = block_sum<kSumThreads>(sum, scratch);
  if (threadIdx.x == 0) *loss = A(add ? double(*loss) + sum : sum);
}

// One block a sample: the norm of its map, and the map divided by it.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    attention_map_normalise(A* map, A* norm, const double* tile_products, int64_t positions) {
  const int64_t sample = blockIdx.x, tiles = tiles_of(positions);
  double square = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    square += tile_products[3 * (sample * tiles + tile)];
  }
  const A factor = A(1 / map_norm(square));
  for (int64_t i = threadIdx.x; i < positions; i += kThreads) map[sample * positions + i] *= factor;
  if (threadIdx.x == 0) norm[sample] = A(std::sqrt(square));
}

// gradient = F^(p-1) * slope[position] for the block's tile; slope is in shared memory.
template <typename T, int V, int P, typename A>
__device__ __forceinline__ void tile_gradient(const Feature& feature, const Place& place, A power,
                                              const A* slope, T* gradient) {
  const int64_t channels = feature.channels, positions = feature.positions;
  const T* x = static_cast<const T*>(feature.data) + place.sample * feature.sample_stride;
  T* out = gradient + place.sample * channels * positions;
  const int thread = threadIdx.x;
  if (!feature.channels_last) {
    const int groups = power_of_two((place.count + V - 1) / V, kTile / V);
    const int rows = kThreads / groups;
    const int group = thread % groups;
    if (group * V >= place.count) return;
    A factor[V];
#pragma unroll
    for (int v = 0; v < V; ++v) factor[v] = slope[group * V + v];
    const int64_t column = place.start + group * V;
#pragma unroll kUnroll<P>
    for (int64_t channel = thread / groups; channel < channels; channel += rows) {
      Pack<T, V> pack = load_pack<T, V>(x + channel * positions + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        narrow(factor[v] * energy_slope<P>(A(widen(pack.element[v])), power), pack.element[v]);
      }
      store_pack(out + channel * positions + column, pack);
    }
    return;
  }
  const int lanes = power_of_two((channels + V - 1) / V, 32);
  const int slots = kThreads / lanes;
  const int lane = thread % lanes;
#pragma unroll kUnroll<P>
  for (int position = thread / lanes; position < place.count; position += slots) {
    const A factor = slope[position];
    const int64_t row = (place.start + position) * channels;
    for (int64_t channel = int64_t(lane) * V; channel < channels; channel += int64_t(lanes) * V) {
      Pack<T, V> pack = load_pack<T, V>(x + row + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        narrow(factor * energy_slope<P>(A(widen(pack.element[v])), power), pack.element[v]);
      }
      store_pack(out + row + channel, pack);
    }
  }
}

template <int P, typename A>
__device__ __forceinline__ void write_gradient(const Feature& feature, const Place& place, A power,
                                               const A* slope, void* gradient) {
  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    if (packs_fit<T, kVector<T>>(feature, gradient)) {
      tile_gradient<T, kVector<T>, P>(feature, place, power, slope, static_cast<T*>(gradient));
    } else {
      tile_gradient<T, 1, P>(feature, place, power, slope, static_cast<T*>(gradient));
    }
  });
}

// dL/dF of every needed feature; `upstream` is the loss's gradient, a scalar on the device.
template <typename A, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    attention_loss_gradient(const __grid_constant__ SlopeTable<A> table, A power,
                            const A* upstream) {
  DYNAMIC_SHARED(A, slope);
  const SlopeTask<A>& task = find_task(table);
  const Place place = place_of(int64_t(blockIdx.x) - task.first_block, task.positions);
  const Feature& feature = task.feature;
  if (int(threadIdx.x) < place.count) {
    const double* row = task.products + 3 * place.sample;
    const double scale = double(*upstream) * double(power) / double(feature.channels) /
                         (double(feature.samples) * double(feature.positions));
    const MapSlope<A> slope_at =
        map_slope<A>({row[task.own_index], row[1 - task.own_index], row[2]}, scale);
    const int64_t at = place.sample * feature.positions + place.start + threadIdx.x;
    slope[threadIdx.x] = slope_at(task.own[at], task.other[at]);
  }
  __syncthreads();
  write_gradient<P>(feature, place, power, slope, task.gradient);
}

// dL/dF from grad = dL/dQ: dL/dA = (grad - (grad.Q) Q) / norm, the second term 0 where the norm is
// clamped. Each block forms grad.Q of its sample anew: two maps are little beside its channels.
template <typename A, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    attention_map_gradient(const __grid_constant__ Feature feature, A power, const A* grad,
                           const A* map, const A* norm, void* gradient) {
  DYNAMIC_SHARED(A, slope);
  __shared__ double scratch[kThreads / 32];
  const int64_t positions = feature.positions;
  const Place place = place_of(blockIdx.x, positions);
  const A* g = grad + place.sample * positions;
  const A* q = map + place.sample * positions;

  double along = 0;
  for (int64_t i = threadIdx.x; i < positions; i += kThreads) along += double(g[i]) * double(q[i]);
  along = block_sum<kThreads>(along, scratch);
  const bool clamped = norm[place.sample] < A(kMapEpsilon);
  const A shrink = clamped ? A(0) : A(along);
  const double divisor = clamped ? kMapEpsilon : double(norm[place.sample]);
  const A factor = A(double(power) / double(feature.channels) / divisor);
  if (int(threadIdx.x) < place.count) {
    const int64_t at = place.start + threadIdx.x;
    slope[threadIdx.x] = factor * (g[at] - shrink * q[at]);
  }
  __syncthreads();
  write_gradient<P>(feature, place, power, slope, gradient);
}

}  // namespace kdfast::cuda
