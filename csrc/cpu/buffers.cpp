#include "cpu/buffers.h"

#include <cstdlib>
#include <deque>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdfast::cpu {
namespace {

constexpr size_t kAlignment = size_t(2) << 20;    // a huge page
constexpr size_t kSmallest = size_t(8) << 20;     // bytes; smaller ones malloc keeps by itself
constexpr size_t kMostKept = size_t(512) << 20;   // bytes of released buffers

class Buffers {
 public:
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = free_.rbegin(); it != free_.rend(); ++it) {
        if (it->bytes != bytes) continue;
        void* data = it->data;
        free_.erase(std::next(it).base());
        kept_ -= bytes;
        return data;
      }
    }
    void* data = nullptr;
    KD_CHECK(posix_memalign(&data, kAlignment, bytes) == 0, "out of memory: ", bytes, " bytes");
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint; without it the first use is slower
#endif
    return data;
  }

  void give(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back({data, bytes});
    kept_ += bytes;
    while (kept_ > kMostKept) {
      kept_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.pop_front();
    }
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::deque<Block> free_;
  size_t kept_ = 0;
};

// Never destroyed: tensors may be released after static objects are.
Buffers& buffers() {
  static auto* instance = new Buffers;
  return *instance;
}

Tensor from_buffer(size_t bytes, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, const Tensor& like, ScalarType dtype) {
  void* data = buffers().take(bytes);
  return torch::stable::from_blob(data, sizes, strides, like.device(), dtype,
                                  [bytes](void* released) { buffers().give(released, bytes); });
}

}  // namespace

Tensor reused_gradient(const DenseFeature& feature) {
  const Tensor& like = feature.tensor;
  return reused_empty(like, {like.size(0), like.size(1), like.size(2), like.size(3)},
                      feature.view.channels_last);
}

Tensor reused_empty(const Tensor& like, const std::vector<int64_t>& sizes, bool channels_last) {
  const int64_t n = sizes[0], c = sizes[1], h = sizes[2], w = sizes[3];
  const size_t bytes = size_t(n * c * h * w) * like.element_size();
  if (bytes < kSmallest) {
    return empty_on(like, sizes, like.scalar_type(),
                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  const std::vector<int64_t> strides = channels_last
                                           ? std::vector<int64_t>{c * h * w, 1, w * c, c}
                                           : std::vector<int64_t>{c * h * w, h * w, w, 1};
  return from_buffer(bytes, sizes, strides, like, like.scalar_type());
}

Tensor reused_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (size_t i = sizes.size(); i-- > 0; numel *= sizes[i]) strides[i] = numel;
  const size_t element = dtype == ScalarType::Double                                  ? 8
                         : dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2
                                                                                      : 4;
  const size_t bytes = size_t(numel) * element;
  if (bytes < kSmallest) return empty_on(like, sizes, dtype);
  return from_buffer(bytes, sizes, strides, like, dtype);
}

}  // namespace kdfast::cpu
