// Random crops and flips; no torch. A block owns up to 1024 pixels of one image: one thread draws
// its crop, all copy pixels of three channels.
#pragma once

#include "augment.h"
#include "cuda/device.cuh"

namespace kdfast::cuda {

constexpr int kCropThreads = 256;
constexpr int kCropPixels = 1024;

// An index outside the images gives NaN.
__global__ void __launch_bounds__(kCropThreads)
    crop_flip(const __grid_constant__ CropFlip op, const uint8_t* images, const int64_t* indices,
              void* out, Storage storage) {
  __shared__ Crop drawn;
  const int64_t area = op.height * op.width;
  const int64_t tiles = (area + kCropPixels - 1) / kCropPixels;
  const int64_t sample = int64_t(blockIdx.x) / tiles;
  const int64_t first = (int64_t(blockIdx.x) - sample * tiles) * kCropPixels;
  const int64_t index = indices[sample];
  const bool outside = index < 0 || index >= op.images;
  if (threadIdx.x == 0) drawn = crop_of(op, uint64_t(index));
  __syncthreads();
  const Crop crop = drawn;
  const uint8_t* image = images + (outside ? 0 : index) * area * 3;
  const int64_t last = first + kCropPixels < area ? first + kCropPixels : area;
  const auto copy = [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(out) + sample * 3 * area;
    for (int64_t at = first + threadIdx.x; at < last; at += kCropThreads) {
      const int64_t y = uint32_t(at) / uint32_t(op.width), x = at - y * op.width;
      const int64_t row = source_of(y + crop.top, op.height, op.reflect);
      const int64_t column =
          source_of((crop.flipped ? op.width - 1 - x : x) + crop.left, op.width, op.reflect);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        const uint8_t pixel =
            row < 0 || column < 0 ? uint8_t(0) : image[3 * (row * op.width + column) + c];
        float value = normalised(pixel, op.shift[c], op.scale[c]);
        if (outside) value = NAN;
        narrow(value, to[op.channels_last ? 3 * at + c : c * area + at]);
      }
    }
  };
  with_storage<float>(storage, copy);
}

}  // namespace kdfast::cuda
