// Building blocks of the kernels: storage types, 16-byte packs, reductions; no torch.
//
// Kernels use warp shuffles and shared memory only, so that the same source runs as C++ on the CPU
// under an emulator (see launch.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "feature.h"
#include "arithmetic.h"

#ifdef __CUDACC__
// The block's dynamic shared memory as an array of T; its size is an argument of the launch.
#define DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char name##_bytes[];    \
  T* name = reinterpret_cast<T*>(name##_bytes)
#else
#include "emulator.h"
#endif

namespace kdfast::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float from, float& to) { to = from; }
__device__ __forceinline__ void narrow(double from, double& to) { to = from; }
__device__ __forceinline__ void narrow(float from, __half& to) { to = __float2half_rn(from); }
__device__ __forceinline__ void narrow(float from, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(from);
}

// V elements moved by one instruction; V is 1, or kVector<T> for 16 bytes.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T element[V];
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Calls body(T{}) with the storage type T of a feature accumulated in A.
template <typename A, typename Body>
__device__ __forceinline__ void with_storage(Storage storage, const Body& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(double{});
  } else if (storage == Storage::kHalf) {
    body(__half{});
  } else if (storage == Storage::kBFloat16) {
    body(__nv_bfloat16{});
  } else {
    body(float{});
  }
}

// Sum over the `width` (a power of two up to 32) neighbouring lanes, in all of them. Every lane of
// the warp takes part.
template <typename A>
__device__ __forceinline__ A warp_sum(A value, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Sum over the block's `Threads` threads, in all of them; always in the same order. `scratch`
// holds Threads / 32 values and may be used again after the next barrier.
template <int Threads, typename A>
__device__ __forceinline__ A block_sum(A value, A* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < Threads / 32; ++warp) sum += scratch[warp];
  return sum;
}

// The smallest power of two that is at least `value`, at most `limit` (itself a power of two).
__device__ __forceinline__ int power_of_two(int64_t value, int limit) {
  int power = 1;
  while (power < value && power < limit) power *= 2;
  return power;
}

}  // namespace kdfast::cuda
