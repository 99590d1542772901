// Kernels with one mistake each, and without it: what the emulator must find (test_emulator.py).
#include <cstdio>
#include <exception>
#include <string>

#include "cuda/device.cuh"

namespace kdfast::cuda {

constexpr int kThreads = 64;

// out[block] = sum of x[block * n .. + n], n up to 64, three ways to get it wrong.
template <bool FirstBarrier, bool SecondBarrier>
__global__ void sums(const float* x, float* out, int n) {
  DYNAMIC_SHARED(float, values);
  const int t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    if (t < n) values[t] = x[(2 * blockIdx.x + round) * n + t];
    if constexpr (FirstBarrier) __syncthreads();
    // Another warp's values are read, last to first.
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += values[(t + i) % n];
    if (t < n) out[(2 * blockIdx.x + round) * n + t] = sum;
    if constexpr (SecondBarrier) __syncthreads();
  }
}

__global__ void divergent(float* out, int n) {
  if (int(threadIdx.x) < n) {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void two_barriers(float* out, int n) {
  if (int(threadIdx.x) < n) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(float* out, int n) {
  if (int(threadIdx.x) % 32 < n) out[threadIdx.x] = warp_sum(1.0f);
  __syncwarp();
}

__global__ void narrow_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1);
}

// What one lane writes another reads: __syncwarp must be between.
template <bool Barrier>
__global__ void neighbours(float* out) {
  DYNAMIC_SHARED(float, values);
  const int t = threadIdx.x;
  values[t] = float(t);
  if constexpr (Barrier) __syncwarp();
  out[t] = values[t ^ 1];
}

__global__ void last_block_first(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x ? out[blockIdx.x - 1] + 1 : 1;
}

__global__ void copy(const float* x, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += kThreads) out[i] = x[i];
}

template <int Size>
__global__ void fixed_array(float* out) {
  __shared__ float values[Size];
  const int t = threadIdx.x;
  values[t] = float(t);
  __syncthreads();
  out[t] = values[kThreads - 1 - t];
}

__global__ void dynamic_array(float* out) {
  DYNAMIC_SHARED(float, values);
  const int t = threadIdx.x;
  values[t] = float(t);
  __syncthreads();
  out[t] = values[kThreads - 1 - t];
}

// The upper half of the array is read and never written.
template <bool Static>
__global__ void uninitialised(float* out, int n) {
  DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[kThreads];
  float* values = Static ? fixed : dynamic;
  const int t = threadIdx.x;
  if (t < n) values[t] = 1;
  __syncthreads();
  out[t] = values[t];
}

// A pack of 16 bytes from an address that 16 does not divide.
__global__ void packs(const float* x, float* out, int offset) {
  store_pack(out + 4 * threadIdx.x, load_pack<float, 4>(x + offset + 4 * threadIdx.x));
}

}  // namespace kdfast::cuda

// Runs a kernel by name; "" or the emulator's words. `x` and `out` have n floats.
extern "C" const char* planted(const char* name, float* x, float* out, int n) {
  using namespace kdfast::cuda;
  static char words[512];
  const std::string wanted = name;
  const size_t bytes = kThreads * sizeof(float);
  words[0] = 0;
  try {
    if (wanted == "sums") launch(sums<true, true>, n / 128, kThreads, bytes, nullptr, x, out, 64);
    if (wanted == "sums, no barrier before the read")
      launch(sums<false, true>, n / 128, kThreads, bytes, nullptr, x, out, 64);
    if (wanted == "sums, no barrier before the re-use")
      launch(sums<true, false>, n / 128, kThreads, bytes, nullptr, x, out, 64);
    if (wanted == "divergent barrier") launch(divergent, 1, kThreads, 0, nullptr, out, 40);
    if (wanted == "convergent barrier") launch(divergent, 1, kThreads, 0, nullptr, out, 64);
    if (wanted == "two barriers") launch(two_barriers, 1, kThreads, 0, nullptr, out, 32);
    if (wanted == "divergent shuffle")
      launch(divergent_shuffle, 1, kThreads, 0, nullptr, out, 16);
    if (wanted == "convergent shuffle")
      launch(divergent_shuffle, 1, kThreads, 0, nullptr, out, 32);
    if (wanted == "narrow mask") launch(narrow_mask, 1, kThreads, 0, nullptr, out);
    if (wanted == "neighbours") launch(neighbours<true>, 1, kThreads, bytes, nullptr, out);
    if (wanted == "neighbours, no __syncwarp")
      launch(neighbours<false>, 1, kThreads, bytes, nullptr, out);
    if (wanted == "blocks in order") launch(last_block_first, 5, kThreads, 0, nullptr, out);
    if (wanted == "copy") launch(copy, 1, kThreads, 0, nullptr, x, out, n);
    if (wanted == "copy, one too many") launch(copy, 1, kThreads, 0, nullptr, x, out, n + 1);
    if (wanted == "fixed array") launch(fixed_array<kThreads>, 1, kThreads, 0, nullptr, out);
    if (wanted == "fixed array too small")
      launch(fixed_array<kThreads - 1>, 1, kThreads, 0, nullptr, out);
    if (wanted == "dynamic array") launch(dynamic_array, 1, kThreads, bytes, nullptr, out);
    if (wanted == "dynamic array too small")
      launch(dynamic_array, 1, kThreads, bytes - 4, nullptr, out);
    if (wanted == "initialised, dynamic")
      launch(uninitialised<false>, 1, kThreads, bytes, nullptr, out, kThreads);
    if (wanted == "uninitialised, dynamic")
      launch(uninitialised<false>, 1, kThreads, bytes, nullptr, out, kThreads / 2);
    if (wanted == "initialised, static")
      launch(uninitialised<true>, 1, kThreads, 0, nullptr, out, kThreads);
    if (wanted == "uninitialised, static")
      launch(uninitialised<true>, 1, kThreads, 0, nullptr, out, kThreads / 2);
    if (wanted == "packs") launch(packs, 1, n / 4, 0, nullptr, x, out, 0);
    if (wanted == "unaligned packs") launch(packs, 1, n / 4 - 1, 0, nullptr, x, out, 1);
    if (wanted == "no blocks") launch(copy, 0, kThreads, 0, nullptr, x, out, n);
    if (wanted == "too many threads") launch(copy, 1, 1056, 0, nullptr, x, out, n);
    if (wanted == "too much shared memory") launch(copy, 1, 32, 50000, nullptr, x, out, n);
  } catch (const std::exception& error) {
    std::snprintf(words, sizeof(words), "%s", error.what());
  }
  return words;
}
