// Glue of the crop and flip kernel.
#include "augment_check.h"
#include "cuda/augment.cuh"
#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

Tensor crop_flip_cuda(Tensor images, Tensor indices, std::vector<double> mean,
                      std::vector<double> std, int64_t padding, bool reflect, bool flip,
                      ScalarType dtype, bool channels_last, int64_t key) {
  const CurrentDevice device(images);
  const CropFlip op = crop_flip_of(images, indices, mean, std, padding,
                                   reflect, flip, dtype, channels_last, key);
  const int64_t batch = indices.size(0), area = op.height * op.width;
  Tensor out = empty_on(images, {batch, 3, op.height, op.width}, dtype,
                        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  launch(crop_flip, batch * ((area + kCropPixels - 1) / kCropPixels), kCropThreads, 0,
         device.stream, op, images.const_data_ptr<uint8_t>(), indices.const_data_ptr<int64_t>(),
         out.mutable_data_ptr(), storage_of("crop_flip", out));
  return out;
}

}  // namespace

KD_CUDA_LIBRARY(m) { m.impl("crop_flip", TORCH_BOX(&crop_flip_cuda)); }

}  // namespace kdfast::cuda
