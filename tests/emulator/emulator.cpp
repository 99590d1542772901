// The scheduler of the emulated threads (see emulator.h), and what Python asks of it.
#include "emulator.h"

#include <dlfcn.h>
#include <cxxabi.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Fibers. On x86-64 a switch saves the registers that a call must keep; ucontext, which also makes
// two system calls for the signal mask, elsewhere.
#ifdef __x86_64__

extern "C" void kd_switch(void** save, void* to);
asm(R"(
.text
.type kd_switch, @function
kd_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size kd_switch, .-kd_switch
)");

struct Context {
  void* stack_pointer;

  void enter_at(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + bytes - 16);
    *top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  static void change(Context& from, Context& to) {
    kd_switch(&from.stack_pointer, to.stack_pointer);
  }
};

#else

#include <ucontext.h>

struct Context {
  ucontext_t context;

  void enter_at(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {stack, 0, bytes};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

namespace kd_emulator {

Fiber* current;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char* dynamic_shared;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10;  // what a launch gets without asking for more
constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

enum class Order { kForward, kReversed, kShuffled };

// Orders of 0..count-1: always the same for the same schedule and sequence of calls.
struct Schedule {
  Order order = Order::kForward;
  uint64_t state = 0;

  uint64_t random() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  template <typename Index>
  void arrange(Index* index, Index count) {
    std::iota(index, index + count, Index(0));
    if (order == Order::kReversed) std::reverse(index, index + count);
    if (order == Order::kShuffled) {
      for (Index i = count - 1; i > 0; --i) std::swap(index[i], index[random() % (i + 1)]);
    }
  }
};

struct Thread : Fiber {
  Context context;
  char* stack;
};

Schedule schedule;
std::map<std::string, int64_t> launches;
std::mutex mutex;

Thread threads[kMaxThreads];
Warp warps[kMaxThreads / 32];
Context scheduler;
std::string failure;
std::string kernel_name;
void (*kernel_call)(void*);
void* kernel_parameters;

// The thread-local variables of this library are the kernels' static shared memory.
thread_local char anchor;

struct Bytes {
  unsigned char* data = nullptr;
  size_t size = 0;
};

Bytes static_shared() {
  volatile char* touched = &anchor;  // a thread gets its copy of the block at the first use
  *touched = 0;
  Bytes found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const auto here = reinterpret_cast<uintptr_t>(&schedule);
        bool ours = false;
        size_t size = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD) ours |= start <= here && here < start + header.p_memsz;
          if (header.p_type == PT_TLS) size = header.p_memsz;
        }
        if (!ours) return 0;
        *static_cast<Bytes*>(out) = {static_cast<unsigned char*>(info->dlpi_tls_data), size};
        return 1;
      },
      &found);
  return found;
}

// "void kdfast::cuda::kernel<float, 2>(float*)", mangled, as "kernel<float, 2>".
std::string short_name(const char* symbol) {
  int status;
  char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : symbol;
  std::free(demangled);
  size_t end = 0;
  for (int depth = 0; end < name.size(); ++end) {
    if (name[end] == '<') ++depth;
    if (name[end] == '>') --depth;
    if (name[end] == '(' && depth == 0) break;
  }
  name.resize(end);
  const size_t before = name.find_last_of(": ", name.find('<'));
  return before == std::string::npos ? name : name.substr(before + 1);
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel of an unnamed namespace";
  return short_name(info.dli_sname);
}

std::string text(const Place& place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(place.operation) + " at " + (slash ? slash + 1 : place.file) + ":" +
         std::to_string(place.line);
}

std::string text(const Fiber& fiber) {
  const std::string who = "thread " + std::to_string(fiber.thread.x);
  return fiber.state == State::kEnded ? who + " has ended" : who + " is at " + text(fiber.place);
}

// Abandons the block: the stacks of its threads are simply used anew by the next one.
[[noreturn]] void give_up(const std::string& reason) {
#ifdef __SANITIZE_ADDRESS__
  for (Thread& thread : threads) {
    if (thread.stack) __asan_unpoison_memory_region(thread.stack, kStack);
  }
#endif
  throw std::runtime_error(kernel_name + ", block " + std::to_string(block_index.x) + " of " +
                           std::to_string(grid_size.x) + ": " + reason);
}

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_bytes;
#endif

void to_scheduler() {
  Thread& thread = *static_cast<Thread*>(current);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_bytes);
#endif
  Context::change(thread.context, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
#endif
}

void to_thread(Thread& thread) {
  current = &thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack);
#endif
  Context::change(scheduler, thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  if (!failure.empty()) give_up(std::exchange(failure, {}));
}

void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
#endif
  kernel_call(kernel_parameters);
  current->state = State::kEnded;
  to_scheduler();
  std::abort();  // an ended thread is never resumed
}

// Below every stack lies a page that faults.
char* new_stack() {
  void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) throw std::bad_alloc();
  return static_cast<char*>(memory) + kPage;
}

void start(int count) {
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack = new_stack();
    thread.thread = {unsigned(i), 0, 0};
    thread.lane = i % 32;
    thread.state = State::kReady;
    thread.warp = &warps[i / 32];
    thread.context.enter_at(thread.stack, kStack, thread_main);
  }
}

// All lanes of a warp to the next block barrier, or to their end.
void run_warp(Thread* lanes, int count) {
  Warp& warp = *lanes[0].warp;
  for (;;) {
    int order[32];
    schedule.arrange(order, count);
    for (int i = 0; i < count; ++i) {
      if (lanes[order[i]].state == State::kReady) to_thread(lanes[order[i]]);
    }
    // Whoever is at a warp operation waits for the whole warp.
    const Thread* first = nullptr;
    uint32_t live = 0;
    for (int i = 0; i < count; ++i) {
      if (lanes[i].state != State::kEnded) live |= 1u << i;
      if (!first && lanes[i].state == State::kAtWarp) first = &lanes[i];
    }
    if (!first) return;
    for (int i = 0; i < count; ++i) {
      const Thread& lane = lanes[i];
      if (lane.state == State::kEnded) continue;
      const std::string where = text(first->place);
      if (lane.state != State::kAtWarp || lane.place.line != first->place.line ||
          std::strcmp(lane.place.file, first->place.file) ||
          std::strcmp(lane.place.operation, first->place.operation)) {
        give_up(where + " is reached by a part of the warp: " + text(*first) + ", " + text(lane));
      }
      if (lane.mask != first->mask) give_up(where + ": the lanes have different masks");
      if (!(lane.mask >> i & 1)) {
        give_up(where + ": the mask leaves out lane " + std::to_string(i) + ", which is there");
      }
    }
    warp.live = live;
    for (int i = 0; i < count; ++i) {
      warp.value[i] = lanes[i].value;
      if (lanes[i].state == State::kAtWarp) lanes[i].state = State::kReady;
    }
  }
}

void run_block(int count) {
  const int warp_count = (count + 31) / 32;
  start(count);
  for (;;) {
    int order[kMaxThreads / 32];
    schedule.arrange(order, warp_count);
    for (int i = 0; i < warp_count; ++i) {
      const int first = 32 * order[i];
      run_warp(threads + first, std::min(32, count - first));
    }
    const Thread* waiting = nullptr;
    for (int i = 0; i < count && !waiting; ++i) {
      if (threads[i].state == State::kAtBlock) waiting = &threads[i];
    }
    if (!waiting) return;
    for (int i = 0; i < count; ++i) {
      const Thread& other = threads[i];
      if (other.state == State::kEnded || other.place.line != waiting->place.line ||
          std::strcmp(other.place.file, waiting->place.file)) {
        give_up(text(waiting->place) + " is reached by a part of the block: " + text(*waiting) +
                ", " + text(other));
      }
    }
    for (int i = 0; i < count; ++i) threads[i].state = State::kReady;
  }
}

}  // namespace

void wait(State state, uint32_t mask, const Place& place) {
  current->state = state;
  current->mask = mask;
  current->place = place;
  to_scheduler();
}

// Runs on a thread's stack, from which no exception may leave.
void fail(const Place& place, const char* reason) {
  failure = text(place) + ": " + reason;
  to_scheduler();
  std::abort();
}

void launch(const void* kernel, void (*call)(void*), void* parameters, int64_t grid, int64_t block,
            size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  kernel_name = name_of(kernel);
  kernel_call = call;
  kernel_parameters = parameters;
  const auto refuse = [&](const char* what, int64_t got, int64_t limit) {
    throw std::runtime_error(kernel_name + ": " + what + " must be from 1 to " +
                             std::to_string(limit) + ", got " + std::to_string(got));
  };
  if (grid < 1 || grid > INT32_MAX) refuse("blocks", grid, INT32_MAX);
  if (block < 1 || block > kMaxThreads) refuse("threads of a block", block, kMaxThreads);
  const Bytes fixed = static_shared();
  if (shared_bytes > kMaxShared) refuse("bytes of shared memory", shared_bytes, kMaxShared);

  grid_size = dim3(unsigned(grid));
  block_size = dim3(unsigned(block));
  // Of the exact size, so that AddressSanitizer sees an access beyond it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, shared_bytes)) throw std::bad_alloc();
  const std::unique_ptr<unsigned char, void (*)(void*)> shared(
      static_cast<unsigned char*>(memory), std::free);
  dynamic_shared = shared.get();
  std::vector<int64_t> order(grid);
  schedule.arrange(order.data(), grid);
  for (const int64_t index : order) {
    block_index = {unsigned(index), 0, 0};
    std::memset(fixed.data, 0xff, fixed.size);
    if (shared_bytes) std::memset(dynamic_shared, 0xff, shared_bytes);
    run_block(int(block));
  }
  ++launches[kernel_name];
}

}  // namespace kd_emulator

// For Python, through ctypes.
extern "C" {

// order: 0 forward, 1 reversed, 2 shuffled by `seed`.
void kd_emulator_schedule(int order, uint64_t seed) {
  kd_emulator::schedule = {static_cast<kd_emulator::Order>(order), seed};
}

// Launches since the library was loaded: a line "count name" a kernel. Valid until the next call.
const char* kd_emulator_launches() {
  static std::string lines;
  lines.clear();
  for (const auto& [name, count] : kd_emulator::launches) {
    lines += std::to_string(count) + " " + name + "\n";
  }
  return lines.c_str();
}

// A symbol of this library as `kd_emulator_launches` shows it. Valid until the next call.
const char* kd_emulator_name(const char* symbol) {
  static std::string name;
  name = kd_emulator::short_name(symbol);
  return name.c_str();
}

// The runtime functions that glue may use; "device" memory is memory.

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

}  // extern "C"
