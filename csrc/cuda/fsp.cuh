// Gram matrix kernels; no torch.
//
// Forward: a block of 256 threads owns a sample of a pair, for both networks. Tiles of both maps,
// pooled and widened on the way, lie in shared memory as [channel][position]; a thread holds 4 x 4
// entries of the matrix and reads 16 bytes of positions at a time. Small matrices leave threads
// over, so groups of threads share the positions of a tile, and their sums are added at the end.
//
// Backward: a block owns a sample of one feature and a tile of its positions, and adds up the parts
// of all pairs that the feature is in: its gradient is written once. A thread holds 4 channels x 2
// positions. No atomics: every sum has a fixed order.
#pragma once

#include "cuda/device.cuh"
#include "fsp.h"

namespace kdfast::cuda {

constexpr int kGramThreads = 256;
constexpr int kGramChannels = 64;  // at most, of either map
constexpr int kGramPairs = 8;      // of one launch; the tables are passed by value
constexpr int kGramParts = 2 * kGramPairs;
constexpr int kGramChunk = 16;        // partner channels of a backward tile
constexpr int kGramOutputs = 2048;    // channels x positions of a backward tile
constexpr int kGramSumThreads = 1024;

// Elements of dynamic shared memory. Forward: at most 128 rows of 32 + 4, 64 of 64 + 4 or 32 of
// 128 + 4; then 16 sums a thread. Backward: the matrix's chunk and the partner's.
constexpr int kGramShared = 4608;
constexpr int kGramGradientShared = kGramChunk * (kGramChannels + kGramOutputs / 16 + 1);

// Forward blocks a multiprocessor must hold: 3 leave 80 registers a thread. Backward 2.
template <typename A>
constexpr int kGramBlocks = sizeof(A) == sizeof(double) ? 2 : 3;

template <typename A>
struct GramTask {
  Grid grid[2][2];  // network, side
  A* out;           // [samples, channels, channels]
  int64_t first_block;
};

template <typename A>
struct GramTable {
  GramTask<A> task[kGramPairs];
  int count;
  int networks;  // 2: the difference of both networks' matrices
  bool maximum;
};

// What a pair adds to the gradient of one of its features.
template <typename A>
struct GramPart {
  Grid partner;
  int64_t width, rows, columns;  // of the feature's own grid
  const A* matrix;               // [samples, channels, channels]: gradient but for the factor
  A factor;
  int side;
};

struct GramGradientTask {
  Feature feature;
  int64_t width;
  void* gradient;
  int64_t first_block;
  int first_part, parts;
};

template <typename A>
struct GramGradientTable {
  GramGradientTask task[kGramParts];
  GramPart<A> part[kGramParts];
  int count;
  bool maximum;
};

// Positions of a backward tile: 128 for up to 16 channels, 64 to 32, 32 to 64.
KD_HD int64_t gram_tile(int64_t channels) {
  return kGramOutputs / (channels <= 16 ? 16 : (channels <= 32 ? 32 : 64));
}

template <typename Table>
__device__ __forceinline__ const auto& gram_task(const Table& table) {
  int task = table.count - 1;
  while (task > 0 && table.task[task].first_block > int64_t(blockIdx.x)) --task;
  return table.task[task];
}

// A sample of a feature, element (channel, position) at data[channel * channel + ...].
template <typename T>
struct Sample {
  const T* data;
  int64_t channel, position;
};

template <typename T>
__device__ __forceinline__ Sample<T> sample_of(const Feature& feature, int64_t sample) {
  return {static_cast<const T*>(feature.data) + sample * feature.sample_stride,
          feature.channels_last ? 1 : feature.positions,
          feature.channels_last ? feature.channels : 1};
}

// A channel of a grid at a position of the grid.
template <typename A, typename T>
__device__ __forceinline__ A grid_value(const Grid& grid, const Sample<T>& x, int64_t channel,
                                        int64_t position, bool maximum) {
  const T* from = x.data + channel * x.channel;
  if (!grid.pooled()) return A(widen(from[position * x.position]));
  from += grid.corner(position) * x.position;
  A value = A(widen(from[0]));
#pragma unroll 1
  for (int64_t row = 0; row < grid.rows; ++row) {
#pragma unroll 1
    for (int64_t column = row == 0 ? 1 : 0; column < grid.columns; ++column) {
      const A next = A(widen(from[(row * grid.feature_width() + column) * x.position]));
      if (!maximum) {
        value += next;
      } else if (replaces(next, value)) {
        value = next;
      }
    }
  }
  return maximum ? value : value / A(grid.window());
}

// to[channel * (width + 4) + i] = the grid at position start + i for `padded` channels; zero beyond
// the feature's channels and `count` positions. Neighbouring lanes read neighbouring elements and
// write different banks: 32 positions (NCHW), or 8 channels x 4 positions (channels_last).
template <typename A>
__device__ __forceinline__ void load_tile(const Grid& grid, int64_t sample, int64_t start,
                                          int64_t count, int padded, int width, bool maximum,
                                          A* to) {
  const Feature& feature = grid.feature;
  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    const Sample<T> x = sample_of<T>(feature, sample);
    const int channels = int(feature.channels), elements = (padded + 7) / 8 * 8 * width;
#pragma unroll 2
    for (int i = threadIdx.x; i < elements; i += kGramThreads) {
      int channel = i / width, position = i % width;
      if (feature.channels_last) {
        const int tile = i / 32, across = width / 4;
        channel = tile / across * 8 + i % 8;
        position = tile % across * 4 + i % 32 / 8;
      }
      if (channel >= padded) continue;
      const bool inside = channel < channels && position < count;
      to[channel * (width + 4) + position] =
          inside ? grid_value<A>(grid, x, channel, start + position, maximum) : A(0);
    }
  });
}

// The Gram matrices of a table's pairs, or their differences between two networks. squares[block] =
// the sum of the squares of a sample's entries, where asked for.
template <typename A>
__global__ void __launch_bounds__(kGramThreads, kGramBlocks<A>)
    gram_matrices(const __grid_constant__ GramTable<A> table, A* squares) {
  DYNAMIC_SHARED(A, shared);
  __shared__ A scratch[kGramThreads / 32];
  constexpr int V = kVector<A>;
  const GramTask<A>& task = gram_task(table);
  const int64_t sample = int64_t(blockIdx.x) - task.first_block;
  const int thread = threadIdx.x;
  const int m = int(task.grid[0][0].feature.channels), n = int(task.grid[0][1].feature.channels);
  const int across = (m + 3) / 4, down = (n + 3) / 4;  // threads of a group, each way
  const int size = across * down, groups = kGramThreads / size;
  const int group = thread / size, row = thread % size % across, column = thread % size / across;
  const int channels = 4 * (across + down);
  const int width = channels <= 32 ? 128 : (channels <= 64 ? 64 : 32), stride = width + 4;
  A* right = shared + 4 * across * stride;

  A own[4][4] = {};
  for (int network = 0; network < table.networks; ++network) {
    const Grid &first = task.grid[network][0], &second = task.grid[network][1];
    const int64_t positions = second.positions;
    A sum[4][4] = {};
    for (int64_t start = 0; start < positions; start += width) {
      const int64_t count = positions - start;
      __syncthreads();
      load_tile(first, sample, start, count, 4 * across, width, table.maximum, shared);
      load_tile(second, sample, start, count, 4 * down, width, table.maximum, right);
      __syncthreads();
      if (group < groups) {
        for (int at = group * V; at < width; at += groups * V) {
          Pack<A, V> left[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            left[i] = load_pack<A, V>(shared + (row + i * across) * stride + at);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Pack<A, V> other = load_pack<A, V>(right + (column + j * down) * stride + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int v = 0; v < V; ++v) sum[i][j] += left[i].element[v] * other.element[v];
            }
          }
        }
      }
    }
    // Equal networks must give exactly 0, fused multiply-adds or not: the ratio is 1 then.
    const A ratio = A(task.grid[0][1].positions) / A(positions);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        own[i][j] = network == 0 ? sum[i][j] : own[i][j] - ratio * sum[i][j];
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) shared[(4 * i + j) * kGramThreads + thread] = own[i][j];
  }
  __syncthreads();
  const A factor = A(1) / A(task.grid[0][1].positions);
  A* out = task.out + sample * m * n;
  A square = 0;
  for (int i = thread; i < 16 * size; i += kGramThreads) {
    const int entry = i / size, place = i % size;
    const int at_row = place % across + entry / 4 * across;
    const int at_column = place / across + entry % 4 * down;
    if (at_row >= m || at_column >= n) continue;
    A sum = 0;
    for (int g = 0; g < groups; ++g) sum += shared[entry * kGramThreads + g * size + place];
    sum *= factor;
    out[at_row * n + at_column] = sum;
    square += sum * sum;
  }
  if (squares != nullptr) {
    square = block_sum<kGramThreads>(square, scratch);
    if (thread == 0) squares[blockIdx.x] = square;
  }
}

// One block: the loss from the sums of squares of every pair and sample.
template <typename A>
__global__ void __launch_bounds__(kGramSumThreads)
    gram_loss_sum(const __grid_constant__ GramTable<A> table, const A* squares, A* loss) {
  __shared__ A scratch[kGramSumThreads / 32];
  A total = 0;
  for (int pair = 0; pair < table.count; ++pair) {
    const GramTask<A>& task = table.task[pair];
    const Feature &first = task.grid[0][0].feature, &second = task.grid[0][1].feature;
    A sum = 0;
    for (int64_t sample = threadIdx.x; sample < first.samples; sample += kGramSumThreads) {
      sum += squares[task.first_block + sample];
    }
    total += sum / (A(first.samples) * A(first.channels * second.channels));
  }
  total = block_sum<kGramSumThreads>(total, scratch);
  if (threadIdx.x == 0) *loss = total;
}

// Whether a position of the feature is the first maximum of its window.
template <typename A, typename T>
__device__ __forceinline__ bool is_maximum(const GramPart<A>& part, const Sample<T>& x,
                                           int64_t width, int64_t channel, int64_t position) {
  const int64_t y = position / width / part.rows * part.rows;
  const int64_t corner = y * width + position % width / part.columns * part.columns;
  const T* from = x.data + channel * x.channel;
  int64_t best = corner;
  A most = A(widen(from[corner * x.position]));
#pragma unroll 1
  for (int64_t row = 0; row < part.rows; ++row) {
#pragma unroll 1
    for (int64_t column = 0; column < part.columns; ++column) {
      const int64_t at = corner + row * width + column;
      const A value = A(widen(from[at * x.position]));
      if (replaces(value, most)) {
        most = value;
        best = at;
      }
    }
  }
  return best == position;
}

// dL/dF of every wanted feature; *upstream, where given, is the loss's gradient on the device.
template <typename A>
__global__ void __launch_bounds__(kGramThreads, 2)
    gram_gradients(const __grid_constant__ GramGradientTable<A> table, const A* upstream) {
  DYNAMIC_SHARED(A, shared);
  constexpr int V = kVector<A>;
  const GramGradientTask& task = gram_task(table);
  const Feature& feature = task.feature;
  const int channels = int(feature.channels), tile = int(gram_tile(channels));
  const int padded = kGramOutputs / tile, half = tile / 2, quads = padded / 4;
  const int64_t tiles = (feature.positions + tile - 1) / tile;
  const int64_t block = int64_t(blockIdx.x) - task.first_block;
  const int64_t sample = block / tiles, start = block % tiles * tile;
  const int thread = threadIdx.x;
  // Neighbouring threads own what neighbours in memory: positions, or channels.
  const int quad = feature.channels_last ? thread % quads : thread / half;
  const int place = feature.channels_last ? thread / quads : thread % half;
  A* weights = shared;                               // [chunk][padded]
  A* values = shared + kGramChunk * kGramChannels;   // [chunk][tile + 1]
  const A scale = upstream == nullptr ? A(1) : *upstream;

  A total[4][2] = {};
  for (int p = task.first_part; p < task.first_part + task.parts; ++p) {
    const GramPart<A>& part = table.part[p];
    const Feature& partner = part.partner.feature;
    const int partners = int(partner.channels);
    const A* matrix = part.matrix + sample * channels * partners;
    const A factor = scale * part.factor;
    const bool pooled = part.rows * part.columns > 1;
    A sum[4][2] = {};
    for (int from = 0; from < partners; from += kGramChunk) {
      __syncthreads();
      for (int i = thread; i < kGramChunk * padded; i += kGramThreads) {
        const int k = part.side == 0 ? i % kGramChunk : i / padded;
        const int channel = part.side == 0 ? i / kGramChunk : i % padded;
        const bool inside = channel < channels && from + k < partners;
        const int at = part.side == 0 ? channel * partners + from + k
                                      : (from + k) * channels + channel;
        weights[k * padded + channel] = inside ? factor * matrix[at] : A(0);
      }
      with_storage<A>(partner.storage, [&](auto element) {
        using T = decltype(element);
        const Sample<T> x = sample_of<T>(partner, sample);
#pragma unroll 2
        for (int i = thread; i < kGramChunk * tile; i += kGramThreads) {
          const int k = partner.channels_last ? i % kGramChunk : i / tile;
          const int position = partner.channels_last ? i / kGramChunk : i % tile;
          A value = 0;
          if (from + k < partners && start + position < feature.positions) {
            int64_t at = start + position;
            if (pooled) {
              at = at / task.width / part.rows * part.width + at % task.width / part.columns;
            }
            value = grid_value<A>(part.partner, x, from + k, at, table.maximum);
          }
          values[k * (tile + 1) + position] = value;
        }
      });
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kGramChunk; ++k) {
        const A left = values[k * (tile + 1) + place];
        const A right = values[k * (tile + 1) + place + half];
#pragma unroll
        for (int c = 0; c < 4; c += V) {
          const Pack<A, V> weight = load_pack<A, V>(weights + k * padded + 4 * quad + c);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sum[c + v][0] += weight.element[v] * left;
            sum[c + v][1] += weight.element[v] * right;
          }
        }
      }
    }
    if (pooled && table.maximum) {
      with_storage<A>(feature.storage, [&](auto element) {
        using T = decltype(element);
        const Sample<T> x = sample_of<T>(feature, sample);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int64_t position = start + place + side * half;
            const int64_t channel = 4 * quad + c;
            if (channel >= channels || position >= feature.positions) continue;
            if (!is_maximum(part, x, task.width, channel, position)) sum[c][side] = A(0);
          }
        }
      });
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      total[c][0] += sum[c][0];
      total[c][1] += sum[c][1];
    }
  }

  with_storage<A>(feature.storage, [&](auto element) {
    using T = decltype(element);
    T* out = static_cast<T*>(task.gradient) + sample * channels * feature.positions;
    const int64_t channel_step = feature.channels_last ? 1 : feature.positions;
    const int64_t position_step = feature.channels_last ? channels : 1;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t position = start + place + side * half;
      if (position >= feature.positions) continue;
      T* to = out + position * position_step;
      if constexpr (sizeof(T) <= 4) {
        if (feature.channels_last && channels % 4 == 0) {
          if (4 * quad >= channels) continue;
          Pack<T, 4> pack;
#pragma unroll
          for (int c = 0; c < 4; ++c) narrow(total[c][side], pack.element[c]);
          store_pack(to + 4 * quad, pack);
          continue;
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int channel = 4 * quad + c;
        if (channel < channels) narrow(total[c][side], to[channel * channel_step]);
      }
    }
  });
}

}  // namespace kdfast::cuda
