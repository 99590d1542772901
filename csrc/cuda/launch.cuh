// Launching kernels from torch: current stream, device guard, launch check, registration.
//
// Compiled by nvcc this is CUDA. Compiled as C++, `emulator.h` on the include path supplies the
// same names (CurrentDevice, launch, DYNAMIC_SHARED, KD_CUDA_LIBRARY, the CUDA built-ins) and runs
// the kernels on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "cuda/device.cuh"

#ifdef __CUDACC__

#define KD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m)

namespace kdfast::cuda {

// Makes the tensor's device current while it lives; `stream` is torch's current stream there.
class CurrentDevice {
 public:
  explicit CurrentDevice(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()) {
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  kernel<<<dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)), shared_bytes,
           stream>>>(std::forward<Arguments>(arguments)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace kdfast::cuda

#endif
