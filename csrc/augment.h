// Random crop and flip of one image, shared by both devices; no torch.
#pragma once

#include "normal.h"
#include "philox.h"

namespace kdfast {

struct CropFlip {
  int64_t images, height, width, padding;
  uint64_t key;
  float shift[3];  // 255 * mean
  float scale[3];  // 1 / (255 * std)
  bool reflect, flip, channels_last;
};

// What is drawn for an image: pixel (y, x) comes from (y + top, x' + left), x' = x or, flipped,
// width - 1 - x.
struct Crop {
  int32_t top, left;
  bool flipped;
};

KD_HD Crop crop_of(const CropFlip& op, uint64_t index) {
  const Bits4 bits = philox(op.key, counter_of(0, index, 0));
  const uint64_t choices = uint64_t(2 * op.padding + 1);
  return {int32_t(int64_t(bits.word[0] * choices >> 32) - op.padding),
          int32_t(int64_t(bits.word[1] * choices >> 32) - op.padding),
          op.flip && (bits.word[2] >> 31) != 0};
}

// The pixel at `at` in a row or column of `size`; -1 is a zero.
KD_HD int64_t source_of(int64_t at, int64_t size, bool reflect) {
  if (at >= 0 && at < size) return at;
  if (!reflect) return -1;
  return at < 0 ? -at : 2 * size - 2 - at;
}

KD_HD float normalised(uint8_t pixel, float shift, float scale) {
  return mul(add(float(pixel), -shift), scale);
}

}  // namespace kdfast
