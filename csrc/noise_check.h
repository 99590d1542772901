// Arguments of the noise ops as the kernels see them.
#pragma once

#include <optional>

#include "check.h"
#include "noise.h"

namespace kdfast {

inline Tensor dense_ids(const char* op, const Tensor& ids, int64_t images) {
  KD_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && ids.size(0) == images, op,
           ": expected int64 ids [", images, "]");
  return torch::stable::contiguous(ids);
}

inline void check_counters(const char* op, int64_t samples, int64_t elements,
                           int64_t first_sample) {
  KD_CHECK(samples > 0 && elements > 0 && first_sample >= 0 &&
               first_sample + samples <= int64_t(1) << 32 && elements <= int64_t(1) << 34,
           op, ": counters out of range");
}

// Rows without a grid; `ids` must be contiguous.
inline NoiseShape flat_noise(const Tensor& ids, int64_t samples, int64_t elements,
                             int64_t first_sample, int64_t key) {
  KD_CHECK(ids.is_contiguous(), "standard_normal: expected contiguous ids");
  dense_ids("standard_normal", ids, ids.size(0));
  check_counters("standard_normal", samples, elements, first_sample);
  return {ids.size(0), samples,  elements, 1, 1, 1, elements, uint32_t(first_sample),
          uint64_t(key), ids.const_data_ptr<int64_t>()};
}

inline NoiseShape image_noise(const char* op, int64_t images, int64_t samples, int64_t channels,
                              int64_t height, int64_t width, int64_t grid, int64_t first_sample,
                              int64_t key, const std::optional<Tensor>& ids) {
  const int64_t elements = channels * height * width;
  KD_CHECK(images > 0 && grid > 0 && grid <= height && grid <= width, op,
           ": expected a non-empty image and a grid that fits it");
  KD_CHECK(height <= kMostPixels && width <= kMostPixels && elements <= int64_t(1) << 32, op,
           ": expected sides of at most 65535 and 2^32 elements");
  check_counters(op, samples, elements, first_sample);
  return {images, samples,  channels, height, width, grid, elements, uint32_t(first_sample),
          uint64_t(key), ids ? ids->const_data_ptr<int64_t>() : nullptr};
}

// Dense tensors, which own the memory, and their sizes.
struct SigmaNoise {
  Tensor image, sigma;
  std::optional<Tensor> ids;
  NoiseShape shape;

  SigmaNoise(const char* op, const Tensor& source, const Tensor& sigmas,
             const std::optional<Tensor>& id_list, int64_t samples, int64_t first_sample,
             int64_t key)
      : image(torch::stable::contiguous(source)), sigma(torch::stable::contiguous(sigmas)) {
    KD_CHECK(image.dim() == 4 && sigma.dim() == 4 && sigma.size(0) == image.size(0) &&
                 sigma.size(1) == 1 && sigma.size(2) == sigma.size(3),
             op, ": expected image [N, C, H, W] and sigma [N, 1, G, G]");
    KD_CHECK(sigma.scalar_type() == accumulate_type(image), op,
             ": expected sigma in the accumulation type");
    if (id_list) ids = dense_ids(op, *id_list, image.size(0));
    shape = image_noise(op, image.size(0), samples, image.size(1), image.size(2), image.size(3),
                        sigma.size(2), first_sample, key, ids);
  }
};

struct SigmaNoiseGrad {
  Tensor grad;
  std::optional<Tensor> ids;
  NoiseShape shape;

  SigmaNoiseGrad(const char* op, const Tensor& source, const std::optional<Tensor>& id_list,
                 int64_t first_sample, int64_t key, int64_t grid)
      : grad(torch::stable::contiguous(source)) {
    KD_CHECK(grad.dim() == 5, op, ": expected grad [N, samples, C, H, W]");
    if (id_list) ids = dense_ids(op, *id_list, grad.size(0));
    shape = image_noise(op, grad.size(0), grad.size(1), grad.size(2), grad.size(3), grad.size(4),
                        grid, first_sample, key, ids);
  }
};

}  // namespace kdfast
