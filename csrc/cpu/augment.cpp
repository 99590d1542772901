// Random crops and flips on the CPU. Each line is put together in bytes and converted at once.
#include <algorithm>
#include <atomic>

#include "augment_check.h"
#include "cpu/buffers.h"
#include "cpu/lanes.h"

namespace kdfast::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // pixels that are worth a thread

template <typename T>
KD_CLONES void convert_packed(const uint8_t* __restrict__ line, int64_t count,
                              const float* __restrict__ shift, const float* __restrict__ scale,
                              T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = narrow_to<T>(normalised(line[i], shift[i], scale[i]));
  }
}

template <typename T>
KD_CLONES void convert_plane(const uint8_t* __restrict__ line, int64_t count, float shift,
                             float scale, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = narrow_to<T>(normalised(line[3 * i], shift, scale));
  }
}

// Line y of the cropped and flipped image, [width, 3].
void cut_line(const CropFlip& op, const Crop& crop, const uint8_t* image, int64_t y,
              uint8_t* line) {
  const int64_t width = op.width, row = source_of(y + crop.top, op.height, op.reflect);
  if (row < 0) {
    std::fill_n(line, 3 * width, uint8_t(0));
    return;
  }
  const uint8_t* from = image + 3 * row * width;
  const int64_t begin = std::clamp<int64_t>(-crop.left, 0, width);
  const int64_t end = std::clamp<int64_t>(width - crop.left, 0, width);
  const auto pad = [&](int64_t x) {
    const int64_t at = source_of(x + crop.left, width, op.reflect);
    for (int c = 0; c < 3; ++c) line[3 * x + c] = at < 0 ? 0 : from[3 * at + c];
  };
  for (int64_t x = 0; x < begin; ++x) pad(x);
  for (int64_t x = std::max(begin, end); x < width; ++x) pad(x);
  if (begin < end) {
    std::copy_n(from + 3 * (begin + crop.left), 3 * (end - begin), line + 3 * begin);
  }
  if (crop.flipped) {
    for (int64_t a = 0, b = width - 1; a < b; ++a, --b) {
      for (int c = 0; c < 3; ++c) std::swap(line[3 * a + c], line[3 * b + c]);
    }
  }
}

Tensor crop_flip(Tensor images, Tensor indices, std::vector<double> mean, std::vector<double> std,
                 int64_t padding, bool reflect, bool flip, ScalarType dtype, bool channels_last,
                 int64_t key) {
  const CropFlip op = crop_flip_of(images, indices, mean, std, padding,
                                   reflect, flip, dtype, channels_last, key);
  const int64_t batch = indices.size(0), height = op.height, width = op.width;
  Tensor out = empty_on(images, {batch, 3, height, width}, dtype,
                        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  std::vector<float> shift(3 * width), scale(3 * width);
  for (int64_t i = 0; i < 3 * width; ++i) {
    shift[i] = op.shift[i % 3];
    scale[i] = op.scale[i % 3];
  }
  const uint8_t* pixels = images.const_data_ptr<uint8_t>();
  const int64_t* index = indices.const_data_ptr<int64_t>();
  void* data = out.mutable_data_ptr();
  const int64_t area = height * width;
  std::atomic<int64_t> outside{-1};
  const auto fill = [&](auto element, int64_t begin, int64_t end) {
    using T = decltype(element);
    std::vector<uint8_t> line(3 * width);
    for (int64_t b = begin; b < end; ++b) {
      if (index[b] < 0 || index[b] >= op.images) {
        outside = b;
        return;
      }
      const Crop crop = crop_of(op, uint64_t(index[b]));
      T* to = static_cast<T*>(data) + b * 3 * area;
      for (int64_t y = 0; y < height; ++y) {
        cut_line(op, crop, pixels + 3 * index[b] * area, y, line.data());
        if (op.channels_last) {
          convert_packed(line.data(), 3 * width, shift.data(), scale.data(), to + 3 * y * width);
        } else {
          for (int c = 0; c < 3; ++c) {
            convert_plane(line.data() + c, width, op.shift[c], op.scale[c],
                          to + c * area + y * width);
          }
        }
      }
    }
  };
  const Storage storage = storage_of("crop_flip", out);
  const int64_t grain = std::max<int64_t>(1, kGrain / area);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    with_storage<float>(storage, [&](auto element) { fill(element, begin, end); });
  });
  KD_CHECK(outside < 0, "crop_flip: indices must be in [0, ", op.images, "), got ",
           index[outside]);
  return out;
}

}  // namespace
}  // namespace kdfast::cpu

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("crop_flip", TORCH_BOX(&kdfast::cpu::crop_flip));
}
