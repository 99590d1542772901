// Noise kernels; no torch.
//
// A thread owns four neighbouring elements of an image, one counter a sample, and goes through a
// group of samples: pixels and sigmas are read once, the part of the generator that does not
// depend on the sample is computed once, and 16 bytes of float results are written at a time. The
// backward draws the same numbers; its threads leave a sum over their samples for each element,
// and a block a cell adds these up. No atomics: every sum has a fixed order, which depends on the
// shape alone.
#pragma once

#include "cuda/device.cuh"
#include "noise.h"
#include "normal.h"

namespace kdfast::cuda {

constexpr int kNoiseThreads = 256;
constexpr int kNoiseSamples = 8;      // of a thread in the forward
constexpr int kNoiseBlocks = 1024;    // wanted of a backward; the samples are split for it
constexpr int kCellThreads = 128;

// Where a thread works: image, group of samples, and counter block (elements 4 * block and on).
struct NoisePlace {
  int64_t image, group, block;
  int count;  // elements, 0 outside the row

  __device__ __forceinline__ NoisePlace(const NoiseShape& shape, int64_t groups) {
    const int64_t blocks = (shape.elements + 3) / 4;
    const uint32_t tiles = uint32_t((blocks + kNoiseThreads - 1) / kNoiseThreads);
    const uint32_t row = blockIdx.x / tiles;
    image = row / uint32_t(groups);
    group = row % uint32_t(groups);
    block = int64_t(blockIdx.x % tiles) * kNoiseThreads + threadIdx.x;
    const int64_t left = shape.elements - 4 * block;
    count = left >= 4 ? 4 : (left > 0 ? int(left) : 0);
  }
};

// Sigmas of the elements [4 * block, 4 * block + count) of an image.
template <typename A>
__device__ __forceinline__ void load_sigmas(const NoiseShape& shape, const A* sigma, int64_t block,
                                            A* out) {
  const uint32_t width = uint32_t(shape.width), height = uint32_t(shape.height);
  const uint32_t grid = uint32_t(shape.grid), element = uint32_t(4 * block);
  uint32_t x = element % width, y = element / width % height;
  uint32_t column = cell_of(x, grid, width), row = cell_of(y, grid, height);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = sigma[row * grid + column];
    // The next pixel; at most one cell on, since there are no more cells than pixels.
    if (++x == width) {
      x = column = 0;
      if (++y == height) y = row = 0;
      if (y * grid >= (row + 1) * height) ++row;
    } else if (x * grid >= (column + 1) * width) {
      ++column;
    }
  }
}

template <typename T>
__device__ __forceinline__ bool packs_of_four(int64_t elements, const void* data) {
  return elements % 4 == 0 && reinterpret_cast<uint64_t>(data) % (4 * sizeof(T)) == 0;
}

template <typename T, typename A>
__device__ __forceinline__ void load_four(const T* from, int count, bool pack, A* to) {
  if (pack) {
    const Pack<T, 4> values = load_pack<T, 4>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = A(widen(values.element[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? A(widen(from[i])) : A(0);
  }
}

template <typename T, typename A>
__device__ __forceinline__ void store_four(T* to, int count, bool pack, const A* from) {
  Pack<T, 4> values;
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow(from[i], values.element[i]);
  if (pack) {
    store_pack(to, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = values.element[i];
    }
  }
}

// out [images, samples, elements] = image + sigma * normals; the normals alone without an image.
// One block a tile of elements and `groups` groups of kNoiseSamples samples.
template <typename A>
__global__ void __launch_bounds__(kNoiseThreads)
    noise_rows(const __grid_constant__ NoiseShape shape, const __grid_constant__ RoundKeys keys,
               const void* image, const A* sigma, void* out, Storage storage, int64_t groups) {
  const NoisePlace place(shape, groups);
  if (place.count == 0) return;
  const uint64_t id = shape.id(place.image);
  const int64_t first = place.group * kNoiseSamples, left = shape.samples - first;
  const int samples = left < kNoiseSamples ? int(left) : kNoiseSamples;
  const int64_t element = 4 * place.block;
  with_storage<A>(storage, [&](auto zero) {
    using T = decltype(zero);
    A pixel[4] = {}, scale[4] = {};
    if (image != nullptr) {
      const T* from = static_cast<const T*>(image) + place.image * shape.elements + element;
      load_four(from, place.count, packs_of_four<T>(shape.elements, image), pixel);
      load_sigmas(shape, sigma + place.image * shape.grid * shape.grid, place.block, scale);
    }
    T* to = static_cast<T*>(out) + (place.image * shape.samples + first) * shape.elements + element;
    const bool pack = packs_of_four<T>(shape.elements, out);
    for (int s = 0; s < samples; ++s, to += shape.elements) {
      const Normal4 normal = normals_of(philox(
          keys, counter_of(uint32_t(place.block), id, shape.first_sample + uint32_t(first + s))));
      A value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = A(normal.value[i]);
        if (image != nullptr) value[i] = pixel[i] + mul(scale[i], value[i]);
      }
      store_four(to, place.count, pack, value);
    }
  });
}

// sums [images, groups, elements]: of grad * normal over a group's samples; totals, if any: of grad.
template <typename A>
__global__ void __launch_bounds__(kNoiseThreads)
    noise_sums(const __grid_constant__ NoiseShape shape, const __grid_constant__ RoundKeys keys,
               const void* grad, Storage storage, int64_t groups, int64_t split, A* sums,
               A* totals) {
  const NoisePlace place(shape, groups);
  if (place.count == 0) return;
  const uint64_t id = shape.id(place.image);
  const int64_t first = place.group * split, left = shape.samples - first;
  const int64_t samples = left < split ? left : split;
  const int64_t element = 4 * place.block;
  A sum[4] = {}, total[4] = {};
  with_storage<A>(storage, [&](auto zero) {
    using T = decltype(zero);
    const T* from =
        static_cast<const T*>(grad) + (place.image * shape.samples + first) * shape.elements +
        element;
    const bool pack = packs_of_four<T>(shape.elements, grad);
    A value[4];
    load_four(from, place.count, pack, value);
    for (int64_t s = 0; s < samples; ++s) {
      A next[4] = {};
      from += shape.elements;
      if (s + 1 < samples) load_four(from, place.count, pack, next);
      const Normal4 normal = normals_of(philox(
          keys, counter_of(uint32_t(place.block), id, shape.first_sample + uint32_t(first + s))));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += value[i] * A(normal.value[i]);
        total[i] += value[i];
        value[i] = next[i];
      }
    }
  });
  const int64_t at = (place.image * groups + place.group) * shape.elements + element;
  const bool pack = packs_of_four<A>(shape.elements, sums);
  store_four(sums + at, place.count, pack, sum);
  if (totals != nullptr) store_four(totals + at, place.count, pack, total);
}

// A block a cell: d sigma from the sums of its elements.
template <typename A>
__global__ void __launch_bounds__(kCellThreads)
    noise_cells(const __grid_constant__ NoiseShape shape, const A* sums, int64_t groups,
                A* d_sigma) {
  __shared__ A scratch[kCellThreads / 32];
  const uint32_t grid = uint32_t(shape.grid), line_length = uint32_t(shape.width);
  const uint32_t image = blockIdx.x / (grid * grid), cell = blockIdx.x % (grid * grid);
  const uint32_t row = cell / grid, column = cell % grid;
  const uint32_t y = first_of(row, grid, shape.height), x = first_of(column, grid, line_length);
  const uint32_t height = first_of(row + 1, grid, shape.height) - y;
  const uint32_t width = first_of(column + 1, grid, line_length) - x;
  const A* own = sums + image * groups * shape.elements;
  A sum = 0;
  for (uint32_t i = threadIdx.x; i < uint32_t(shape.channels) * height * width;
       i += kCellThreads) {
    const uint32_t line = i / width, channel = line / height;
    const uint32_t at = (channel * uint32_t(shape.height) + y + line % height) * line_length + x +
                        i % width;
    for (int64_t group = 0; group < groups; ++group) sum += own[group * shape.elements + at];
  }
  sum = block_sum<kCellThreads>(sum, scratch);
  if (threadIdx.x == 0) d_sigma[blockIdx.x] = sum;
}

// d image from the totals of the groups.
template <typename A>
__global__ void __launch_bounds__(kNoiseThreads)
    noise_totals(const __grid_constant__ NoiseShape shape, const A* totals, int64_t groups,
                 Storage storage, void* d_image) {
  const uint32_t tiles = uint32_t((shape.elements + kNoiseThreads - 1) / kNoiseThreads);
  const int64_t image = blockIdx.x / tiles;
  const int64_t element = int64_t(blockIdx.x % tiles) * kNoiseThreads + threadIdx.x;
  if (element >= shape.elements) return;
  const A* from = totals + image * groups * shape.elements + element;
  A sum = 0;
  for (int64_t group = 0; group < groups; ++group) sum += from[group * shape.elements];
  with_storage<A>(storage, [&](auto zero) {
    narrow(sum, static_cast<decltype(zero)*>(d_image)[image * shape.elements + element]);
  });
}

}  // namespace kdfast::cuda
