// Normal noise on the CPU. A task is a tile of elements of one image and its samples in turn: image
// and sigma of the tile are read once, the normals never leave the first-level cache.
#include <algorithm>
#include <optional>

#include "check.h"
#include "cpu/buffers.h"
#include "cpu/lanes.h"
#include "cpu/random.h"
#include "noise.h"
#include "noise_check.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kTile = 1024;  // elements of a task; a multiple of 4
constexpr int64_t kStep = 256;   // elements drawn and written at a time: while the memory takes
                                 // them the next are drawn
constexpr int64_t kStreamFrom = int64_t(16) << 20;  // results that no cache would keep, in bytes
constexpr int64_t kGrain = 8192;                    // normals that are worth a thread
constexpr int64_t kTasks = 64;     // tasks wanted of a backward; the samples are split for it
constexpr int64_t kSplit = 16;     // into groups of so many

template <typename A, typename T>
KD_CLONES void convert(const float* __restrict__ from, int64_t count, T* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow_to<T>(A(from[i]));
}

template <typename A, typename T>
KD_CLONES void widen_all(const T* __restrict__ from, int64_t count, A* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = A(widen(from[i]));
}

template <typename A, typename T>
KD_CLONES void add_noise(const A* __restrict__ image, const A* __restrict__ sigma,
                         const float* __restrict__ normal, int64_t count, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow_to<T>(image[i] + sigma[i] * A(normal[i]));
}

template <typename A, typename T>
KD_CLONES void add_products(const T* __restrict__ grad, const float* __restrict__ normal,
                            int64_t count, A* __restrict__ sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += A(widen(grad[i])) * A(normal[i]);
}

template <typename A, typename T>
KD_CLONES void add_all(const T* __restrict__ grad, int64_t count, A* __restrict__ sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += A(widen(grad[i]));
}

// Writes `count` elements made by make(target): past the caches if `stream`.
template <typename T, typename Make>
void put(T* out, int64_t count, bool stream, const Make& make) {
  if (!stream) {
    make(out);
    return;
  }
  alignas(64) T buffer[kStep];
  make(buffer);
  stream_copy(out, buffer, count * sizeof(T));
}

// Sigma of elements [start, start + count) of an image.
template <typename A>
void up_sample(const NoiseShape& shape, const A* sigma, int64_t start, int64_t count, A* out) {
  int64_t x = start % shape.width, y = start / shape.width % shape.height;
  while (count > 0) {
    const A* row = sigma + cell_of(y, shape.grid, shape.height) * shape.grid;
    const int64_t end = std::min(shape.width, x + count);
    int64_t cell = cell_of(x, shape.grid, shape.width);
    count -= end - x;
    while (x < end) {
      const int64_t next =
          std::min(end, int64_t(first_of(cell + 1, shape.grid, shape.width)));
      for (; x < next; ++x) *out++ = row[cell];
      ++cell;
    }
    x = 0;
    y = y + 1 == shape.height ? 0 : y + 1;
  }
}

int64_t tiles_of(const NoiseShape& shape) { return (shape.elements + kTile - 1) / kTile; }

Tensor standard_normal(Tensor ids, int64_t samples, int64_t elements, int64_t first_sample,
                       int64_t key, ScalarType dtype) {
  const NoiseShape shape = flat_noise(ids, samples, elements, first_sample, key);
  Tensor out = reused_empty(ids, {shape.images, samples, elements}, dtype);
  const Storage storage = storage_of("standard_normal", out);
  const RandomLoops& random = random_loops();
  const int64_t tiles = tiles_of(shape);
  const bool stream = out.numel() * int64_t(out.element_size()) >= kStreamFrom;
  void* data = out.mutable_data_ptr();
  const auto fill = [&](auto zero, int64_t begin, int64_t end) {
    using A = decltype(zero);
    with_storage<A>(storage, [&](auto element) {
      using T = decltype(element);
      alignas(64) float normal[kStep];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / tiles, start = task % tiles * kTile;
        const int64_t count = std::min(kTile, elements - start);
        for (int64_t i = 0; i < count; i += kStep) {
          const int64_t step = std::min(kStep, count - i);
          random.normals(shape.key, shape.id(row / samples),
                         shape.first_sample + uint32_t(row % samples), uint32_t((start + i) / 4),
                         step, normal);
          put(static_cast<T*>(data) + row * elements + start + i, step, stream,
              [&](T* to) { convert<A>(normal, step, to); });
        }
      }
    });
    stream_fence();
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(kTile, elements));
  torch::stable::parallel_for(0, shape.images * samples * tiles, grain,
                              [&](int64_t begin, int64_t end) {
                                if (storage == Storage::kDouble) {
                                  fill(double{}, begin, end);
                                } else {
                                  fill(float{}, begin, end);
                                }
                              });
  return out;
}

Tensor standard_normal_loop(Tensor like, std::string loop, int64_t elements, int64_t id,
                            int64_t sample, int64_t key) {
  const RandomLoops* random = find_random_loops(loop.c_str());
  const bool able = random != nullptr && random->supported;
  Tensor out = empty_on(like, {able ? elements : 0}, ScalarType::Float);
  if (able) {
    random->normals(uint64_t(key), uint64_t(id), uint32_t(sample), 0, elements,
                    out.mutable_data_ptr<float>());
  }
  return out;
}

Tensor sigma_noise(Tensor image, Tensor sigma, std::optional<Tensor> ids, int64_t samples,
                   int64_t first_sample, int64_t key) {
  const SigmaNoise noise("sigma_noise", image, sigma, ids, samples, first_sample, key);
  const NoiseShape& shape = noise.shape;
  Tensor out = reused_empty(
      image, {shape.images, samples, shape.channels, shape.height, shape.width},
      image.scalar_type());
  const Storage storage = storage_of("sigma_noise", image);
  const RandomLoops& random = random_loops();
  const int64_t tiles = tiles_of(shape), elements = shape.elements;
  const bool stream = out.numel() * int64_t(out.element_size()) >= kStreamFrom;
  void* data = out.mutable_data_ptr();
  with_accumulator(image, [&](auto zero) {
    using A = decltype(zero);
    with_storage<A>(storage, [&](auto element) {
      using T = decltype(element);
      const T* images = static_cast<const T*>(noise.image.const_data_ptr());
      const A* sigmas = noise.sigma.template const_data_ptr<A>();
      // A tile's samples are neighbours, so that it is prepared once.
      const auto body = [&](int64_t begin, int64_t end) {
        alignas(64) A pixel[kTile], scale[kTile];
        alignas(64) float normal[kStep];
        for (int64_t task = begin, ready = -1; task < end; ++task) {
          const int64_t tile = task / samples, sample = task % samples;
          const int64_t n = tile / tiles, start = tile % tiles * kTile;
          const int64_t count = std::min(kTile, elements - start);
          if (tile != ready) {
            widen_all(images + n * elements + start, count, pixel);
            up_sample(shape, sigmas + n * shape.grid * shape.grid, start, count, scale);
            ready = tile;
          }
          T* to = static_cast<T*>(data) + (n * samples + sample) * elements + start;
          for (int64_t i = 0; i < count; i += kStep) {
            const int64_t step = std::min(kStep, count - i);
            random.normals(shape.key, shape.id(n), shape.first_sample + uint32_t(sample),
                           uint32_t((start + i) / 4), step, normal);
            put(to + i, step, stream,
                [&](T* to) { add_noise(pixel + i, scale + i, normal, step, to); });
          }
        }
        stream_fence();
      };
      const int64_t grain = std::max<int64_t>(1, kGrain / std::min(kTile, elements));
      torch::stable::parallel_for(0, shape.images * tiles * samples, grain, body);
    });
  });
  return out;
}

// d sigma: sums over the samples of each element first, in groups of samples that depend on the
// shape alone, then over the elements of each cell; d image the first of these sums.
std::tuple<Tensor, Tensor> sigma_noise_backward(Tensor grad, std::optional<Tensor> ids,
                                                int64_t first_sample, int64_t key, int64_t grid,
                                                bool want_image) {
  const SigmaNoiseGrad noise("sigma_noise_backward", grad, ids, first_sample, key, grid);
  const NoiseShape& shape = noise.shape;
  const int64_t images = shape.images, samples = shape.samples, elements = shape.elements;
  const int64_t tiles = tiles_of(shape);
  const int64_t split = images * tiles >= kTasks ? samples : std::min(samples, kSplit);
  const int64_t groups = (samples + split - 1) / split;
  const ScalarType type = accumulate_type(grad);
  const Storage storage = storage_of("sigma_noise_backward", grad);
  const RandomLoops& random = random_loops();

  std::vector<int64_t> image_sizes{images, shape.channels, shape.height, shape.width};
  Tensor d_image = empty_on(grad, want_image ? image_sizes : std::vector<int64_t>{0},
                            grad.scalar_type());
  Tensor d_sigma = empty_on(grad, {images, 1, grid, grid}, type);
  Tensor sums = empty_on(grad, {images, groups, elements}, type);
  Tensor totals = empty_on(grad, {want_image ? images * groups * elements : 0}, type);
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    A* sum_data = sums.mutable_data_ptr<A>();
    A* total_data = totals.mutable_data_ptr<A>();
    with_storage<A>(storage, [&](auto element) {
      using T = decltype(element);
      const T* grads = static_cast<const T*>(noise.grad.const_data_ptr());
      const auto body = [&](int64_t begin, int64_t end) {
        alignas(64) float normal[kTile];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task % groups, n = task / groups / tiles;
          const int64_t start = task / groups % tiles * kTile;
          const int64_t count = std::min(kTile, elements - start);
          const int64_t at = (n * groups + group) * elements + start;
          A* sum = sum_data + at;
          std::fill_n(sum, count, A(0));
          if (want_image) std::fill_n(total_data + at, count, A(0));
          const int64_t last = std::min(samples, (group + 1) * split);
          for (int64_t sample = group * split; sample < last; ++sample) {
            const T* g = grads + (n * samples + sample) * elements + start;
            if (sample + 1 < last) prefetch(g + elements, count * sizeof(T));
            random.normals(shape.key, shape.id(n), shape.first_sample + uint32_t(sample),
                           uint32_t(start / 4), count, normal);
            add_products(g, normal, count, sum);
            if (want_image) add_all(g, count, total_data + at);
          }
        }
      };
      torch::stable::parallel_for(0, images * tiles * groups, 1, body);
      if (!want_image) return;
      T* out = static_cast<T*>(d_image.mutable_data_ptr());
      torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          A* first = total_data + n * groups * elements;
          for (int64_t group = 1; group < groups; ++group) {
            add_all(first + group * elements, elements, first);
          }
          for (int64_t i = 0; i < elements; ++i) out[n * elements + i] = narrow_to<T>(first[i]);
        }
      });
    });

    A* out = d_sigma.mutable_data_ptr<A>();
    // A task is a row of cells.
    torch::stable::parallel_for(0, images * grid, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / grid, cell_y = task % grid;
        std::vector<double> cells(grid);
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t c = 0; c < shape.channels; ++c) {
            const A* plane =
                sum_data + (n * groups + group) * elements + c * shape.height * shape.width;
            const int64_t last = first_of(cell_y + 1, grid, shape.height);
            for (int64_t y = first_of(cell_y, grid, shape.height); y < last; ++y) {
              const A* row = plane + y * shape.width;
              for (int64_t cell = 0, x = 0; cell < grid; ++cell) {
                const int64_t next = first_of(cell + 1, grid, shape.width);
                double sum = 0;
                for (; x < next; ++x) sum += double(row[x]);
                cells[cell] += sum;
              }
            }
          }
        }
        for (int64_t cell = 0; cell < grid; ++cell) out[task * grid + cell] = A(cells[cell]);
      }
    });
  });
  return {d_image, d_sigma};
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("standard_normal", TORCH_BOX(&kdfast::cpu::standard_normal));
  m.impl("standard_normal_loop", TORCH_BOX(&kdfast::cpu::standard_normal_loop));
  m.impl("sigma_noise", TORCH_BOX(&kdfast::cpu::sigma_noise));
  m.impl("sigma_noise_backward", TORCH_BOX(&kdfast::cpu::sigma_noise_backward));
}
