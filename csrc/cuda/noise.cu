// Glue of the noise kernels.
#include <algorithm>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/noise.cuh"
#include "noise_check.h"

namespace kdfast::cuda {
namespace {

int64_t tiles_of(const NoiseShape& shape) {
  return ((shape.elements + 3) / 4 + kNoiseThreads - 1) / kNoiseThreads;
}

template <typename A>
void fill(const NoiseShape& shape, const void* image, const A* sigma, void* out, Storage storage,
          cudaStream_t stream) {
  const int64_t groups = (shape.samples + kNoiseSamples - 1) / kNoiseSamples;
  launch(noise_rows<A>, shape.images * tiles_of(shape) * groups, kNoiseThreads, 0, stream, shape,
         round_keys(shape.key), image, sigma, out, storage, groups);
}

Tensor standard_normal(Tensor ids, int64_t samples, int64_t elements, int64_t first_sample,
                       int64_t key, ScalarType dtype) {
  const CurrentDevice device(ids);
  const NoiseShape shape = flat_noise(ids, samples, elements, first_sample, key);
  Tensor out = empty_on(ids, {shape.images, samples, elements}, dtype);
  const Storage storage = storage_of("standard_normal", out);
  with_accumulator(out, [&](auto zero) {
    using A = decltype(zero);
    fill<A>(shape, nullptr, nullptr, out.mutable_data_ptr(), storage, device.stream);
  });
  return out;
}

Tensor sigma_noise(Tensor image, Tensor sigma, std::optional<Tensor> ids, int64_t samples,
                   int64_t first_sample, int64_t key) {
  const CurrentDevice device(image);
  const SigmaNoise noise("sigma_noise", image, sigma, ids, samples, first_sample, key);
  const NoiseShape& shape = noise.shape;
  Tensor out = empty_on(image,
                        {shape.images, samples, shape.channels, shape.height, shape.width},
                        image.scalar_type());
  const Storage storage = storage_of("sigma_noise", image);
  with_accumulator(image, [&](auto zero) {
    using A = decltype(zero);
    fill<A>(shape, noise.image.const_data_ptr(), noise.sigma.template const_data_ptr<A>(),
            out.mutable_data_ptr(), storage, device.stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> sigma_noise_backward(Tensor grad, std::optional<Tensor> ids,
                                                int64_t first_sample, int64_t key, int64_t grid,
                                                bool want_image) {
  const CurrentDevice device(grad);
  const SigmaNoiseGrad noise("sigma_noise_backward", grad, ids, first_sample, key, grid);
  const NoiseShape& shape = noise.shape;
  const int64_t blocks = shape.images * tiles_of(shape);
  const int64_t wanted = std::min(shape.samples, (kNoiseBlocks + blocks - 1) / blocks);
  const int64_t split = (shape.samples + wanted - 1) / wanted;
  const int64_t groups = (shape.samples + split - 1) / split;
  const ScalarType type = accumulate_type(grad);
  const Storage storage = storage_of("sigma_noise_backward", grad);

  std::vector<int64_t> image_sizes{shape.images, shape.channels, shape.height, shape.width};
  Tensor d_image = empty_on(grad, want_image ? image_sizes : std::vector<int64_t>{0},
                            grad.scalar_type());
  Tensor d_sigma = empty_on(grad, {shape.images, 1, grid, grid}, type);
  Tensor sums = empty_on(grad, {shape.images, groups, shape.elements}, type);
  Tensor totals = empty_on(grad, {want_image ? shape.images * groups * shape.elements : 0}, type);
  with_accumulator(grad, [&](auto zero) {
    using A = decltype(zero);
    A* total = want_image ? totals.mutable_data_ptr<A>() : nullptr;
    launch(noise_sums<A>, blocks * groups, kNoiseThreads, 0, device.stream, shape,
           round_keys(shape.key), noise.grad.const_data_ptr(), storage, groups, split, sums.mutable_data_ptr<A>(), total);
    launch(noise_cells<A>, shape.images * grid * grid, kCellThreads, 0, device.stream, shape,
           sums.const_data_ptr<A>(), groups, d_sigma.mutable_data_ptr<A>());
    if (want_image) {
      const int64_t tiles = (shape.elements + kNoiseThreads - 1) / kNoiseThreads;
      launch(noise_totals<A>, shape.images * tiles, kNoiseThreads, 0, device.stream, shape, static_cast<const A*>(total), groups, storage,
             d_image.mutable_data_ptr());
    }
  });
  return {d_image, d_sigma};
}

}  // namespace

KD_CUDA_LIBRARY(m) {
  m.impl("standard_normal", TORCH_BOX(&standard_normal));
  m.impl("sigma_noise", TORCH_BOX(&sigma_noise));
  m.impl("sigma_noise_backward", TORCH_BOX(&sigma_noise_backward));
}

}  // namespace kdfast::cuda
