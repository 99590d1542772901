// A feature map as the kernels see it: a pointer, sizes and a layout; no torch.
#pragma once

#include <cstdint>

namespace kdfast {

enum class Storage : int32_t { kFloat, kHalf, kBFloat16, kDouble };

// [samples, channels, positions], positions = height * width. Within a sample the elements are
// dense: channel-major (NCHW) or position-major (channels_last).
struct Feature {
  const void* data;
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int64_t sample_stride;  // in elements; larger than channels * positions for a slice
  Storage storage;
  bool channels_last;
};

}  // namespace kdfast
