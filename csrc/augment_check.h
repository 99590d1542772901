// Arguments of crop_flip as the kernels see them.
#pragma once

#include <vector>

#include "augment.h"
#include "check.h"

namespace kdfast {

inline CropFlip crop_flip_of(const Tensor& images, const Tensor& indices,
                             const std::vector<double>& mean, const std::vector<double>& std,
                             int64_t padding, bool reflect, bool flip, ScalarType dtype,
                             bool channels_last, int64_t key) {
  KD_CHECK(images.dim() == 4 && images.size(3) == 3 && images.is_contiguous() &&
               images.numel() > 0 && images.scalar_type() == ScalarType::Byte,
           "crop_flip: expected contiguous uint8 images [n, H, W, 3]");
  KD_CHECK(indices.dim() == 1 && indices.numel() > 0 && indices.is_contiguous() &&
               indices.scalar_type() == ScalarType::Long,
           "crop_flip: expected contiguous int64 indices [B]");
  KD_CHECK(dtype != ScalarType::Double, "crop_flip: expected float32, float16 or bfloat16");
  KD_CHECK(mean.size() == 3 && std.size() == 3, "crop_flip: expected three means and stds");
  const int64_t height = images.size(1), width = images.size(2);
  KD_CHECK(padding >= 0 && (!reflect || (padding < height && padding < width)),
           "crop_flip: padding out of range");
  CropFlip op{images.size(0), height, width, padding, uint64_t(key), {}, {}, reflect, flip,
              channels_last};
  for (int c = 0; c < 3; ++c) {
    op.shift[c] = float(255 * mean[c]);
    op.scale[c] = float(1 / (255 * std[c]));
  }
  return op;
}

}  // namespace kdfast
