// CUDA kernels as C++ on the CPU: included by csrc/cuda/device.cuh when no CUDA compiler is at work.
//
// The types come from the genuine CUDA headers; here are the built-ins (threadIdx, barriers, warp
// operations, intrinsics), shared memory and the launch. Every thread of a block is a fiber; blocks
// run one after another. A warp runs until all its lanes wait at a block barrier or have ended,
// then the next warp does; within a warp the lanes run one by one up to their next warp operation.
// The order of blocks, warps and lanes is the schedule (emulator.cpp). An error is an exception
// that names kernel, block and place:
//
//   a block barrier that not every thread of the block reaches, the same one for all
//   a warp operation that not every living lane of the warp reaches, or whose mask leaves one out
//   a launch that a GPU would refuse (grid, block or shared memory too large or empty)
//
// Shared memory, static and dynamic, is NaN (bytes 0xff) when a block starts; a shuffle from a lane
// that has ended gives the same. Out-of-bounds accesses are left to -fsanitize=address,undefined.
//
// Not here: inline PTX, cub, cooperative groups, atomics, cp.async, matrix instructions, textures.
// Not seen: races between blocks, weak memory ordering, anything about speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __shared__
#undef __launch_bounds__
#define __shared__ thread_local  // the thread-local block of the library is what a block starts with
#define __launch_bounds__(...)

namespace kd_emulator {

enum class State : uint8_t { kReady, kAtWarp, kAtBlock, kEnded };

// Where a thread waits: an operation by name, and its call in the source.
struct Place {
  const char* operation;
  const char* file;
  int line;
};

struct Warp {
  uint64_t value[32];  // what the lanes gave to the last warp operation
  uint32_t live;       // the lanes that took part
};

struct Fiber {
  uint3 thread;
  int lane;
  State state;
  Place place;
  uint32_t mask;
  uint64_t value;
  Warp* warp;
};

// The running thread and its block; they change only inside `wait`.
extern Fiber* current;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char* dynamic_shared;

// Give way until the scheduler has everyone this operation needs.
void wait(State state, uint32_t mask, const Place& place);
[[noreturn]] void fail(const Place& place, const char* reason);

void launch(const void* kernel, void (*call)(void*), void* parameters, int64_t grid, int64_t block,
            size_t shared_bytes);

// Every lane gives `value`; afterwards warp->value has them all, until the next operation.
template <typename T>
inline const Warp& exchange(uint32_t mask, T value, const Place& place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  current->value = 0;
  std::memcpy(&current->value, &value, sizeof(T));
  wait(State::kAtWarp, mask, place);
  return *current->warp;
}

// The value of the lane that `source(lane, start, width)` names; start is the first of its segment.
template <typename T, typename Source>
inline T shuffle(uint32_t mask, T value, int width, const Place& place, const Source& source) {
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fail(place, "width must be a power of two up to 32");
  }
  const Warp& warp = exchange(mask, value, place);
  const int lane = current->lane, from = source(lane, lane & ~(width - 1));
  T result;
  if (warp.live >> from & 1) {
    std::memcpy(&result, &warp.value[from], sizeof(T));
  } else {
    std::memset(&result, 0xff, sizeof(T));
  }
  return result;
}

inline uint32_t ballot(uint32_t mask, bool predicate, const Place& place) {
  const Warp& warp = exchange(mask, predicate, place);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (warp.live >> lane & 1) result |= uint32_t(warp.value[lane] & 1) << lane;
  }
  return result;
}

}  // namespace kd_emulator

#define threadIdx (::kd_emulator::current->thread)
#define blockIdx (::kd_emulator::block_index)
#define blockDim (::kd_emulator::block_size)
#define gridDim (::kd_emulator::grid_size)
#define warpSize 32

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::kd_emulator::dynamic_shared)

// Arguments that tell a built-in where it is called.
#define KD_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define KD_PLACE(operation) ::kd_emulator::Place{operation, file, line}

inline void __syncthreads(KD_CALLER) {
  ::kd_emulator::wait(::kd_emulator::State::kAtBlock, 0, KD_PLACE("__syncthreads"));
}

inline void __syncwarp(unsigned mask = 0xffffffffu, KD_CALLER) {
  ::kd_emulator::wait(::kd_emulator::State::kAtWarp, mask, KD_PLACE("__syncwarp"));
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, KD_CALLER) {
  return ::kd_emulator::shuffle(mask, value, width, KD_PLACE("__shfl_sync"), [&](int, int start) {
    return start + (source & (width - 1));
  });
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, KD_CALLER) {
  return ::kd_emulator::shuffle(mask, value, width, KD_PLACE("__shfl_xor_sync"),
                                [&](int lane, int start) {
                                  const int from = lane ^ lanes;
                                  return from < start + width && from >= 0 ? from : lane;
                                });
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, KD_CALLER) {
  return ::kd_emulator::shuffle(mask, value, width, KD_PLACE("__shfl_up_sync"),
                                [&](int lane, int start) {
                                  return int(delta) <= lane - start ? lane - int(delta) : lane;
                                });
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, KD_CALLER) {
  return ::kd_emulator::shuffle(
      mask, value, width, KD_PLACE("__shfl_down_sync"), [&](int lane, int start) {
        return int(delta) < start + width - lane ? lane + int(delta) : lane;
      });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, KD_CALLER) {
  return ::kd_emulator::ballot(mask, predicate, KD_PLACE("__ballot_sync"));
}

inline int __any_sync(unsigned mask, int predicate, KD_CALLER) {
  return ::kd_emulator::ballot(mask, predicate, KD_PLACE("__any_sync")) != 0;
}

inline int __all_sync(unsigned mask, int predicate, KD_CALLER) {
  return ::kd_emulator::ballot(mask, !predicate, KD_PLACE("__all_sync")) == 0;
}

// Integers.

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline int __float2int_rn(float x) { return int(std::nearbyintf(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }

// Arithmetic with its rounding said. The library is compiled without contraction.

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

// The fast intrinsics are exact. glibc declares functions of some of the names, hence macros.

#define __expf(x) (::std::exp(float(x)))
#define __exp10f(x) (::std::pow(10.0f, float(x)))
#define __logf(x) (::std::log(float(x)))
#define __log2f(x) (::std::log2(float(x)))
#define __log10f(x) (::std::log10(float(x)))
#define __powf(x, y) (::std::pow(float(x), float(y)))
#define __sinf(x) (::std::sin(float(x)))
#define __cosf(x) (::std::cos(float(x)))
#define __tanf(x) (::std::tan(float(x)))
#define __sincosf(x, sine, cosine) \
  (void)(*(sine) = ::std::sin(float(x)), *(cosine) = ::std::cos(float(x)))
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }

template <typename A, typename B>
inline std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
  return C(a) < C(b) ? C(b) : C(a);
}

template <typename A, typename B>
inline std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));
  return C(b) < C(a) ? C(b) : C(a);
}

// Loads and stores with a cache hint.

template <typename T>
inline T __ldg(const T* from) { return *from; }
template <typename T>
inline T __ldcs(const T* from) { return *from; }
template <typename T>
inline T __ldcg(const T* from) { return *from; }
template <typename T>
inline void __stcs(T* to, T value) { *to = value; }
template <typename T>
inline void __stcg(T* to, T value) { *to = value; }

// What csrc/cuda/launch.cuh offers to the glue.

namespace kdfast::cuda {

class CurrentDevice {
 public:
  template <typename Tensor>
  explicit CurrentDevice(const Tensor&) {}

  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "a kernel's parameters are copied to the device byte by byte");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  ::kd_emulator::launch(
      reinterpret_cast<const void*>(kernel),
      [](void* at) {
        const Call& call = *static_cast<const Call*>(at);
        std::apply(call.kernel, call.parameters);
      },
      &call, grid, block, shared_bytes);
}

}  // namespace kdfast::cuda

// Kernels answer to torch.ops.<KD_NAMESPACE>.* on CPU tensors.
#define KD_EMULATED_IMPL(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m)
#define KD_CUDA_LIBRARY(m) KD_EMULATED_IMPL(KD_NAMESPACE, m)
