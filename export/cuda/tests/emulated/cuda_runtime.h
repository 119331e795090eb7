// Runs CUDA kernels on a CPU, block after block, a block's threads as fibers: for tests where there is no GPU.
//
// A fiber runs until it meets a barrier. Threads of a block that wait at different barriers, or a shuffle that a thread
// of its warp does not come to, end the program: a GPU would hang, or compute anything. With EMULATED_BACKWARDS threads
// run in the opposite order: where a barrier is missing the results differ. The device's memory is closed but while a
// kernel or a copy runs: a host that reads it ends the program, as does a kernel that is given a pointer of the host.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "shared.h"

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local  // of the one thread that all fibers share

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 blockIdx, threadIdx;

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 16, kSharedFloats = 12288;  // 48 KiB of the latter
constexpr size_t kMemory = 1 << 30;

[[noreturn]] inline void give_up(const char* what) {
  std::fprintf(stderr, "emulated block %u: %s\n", blockIdx.x, what);
  std::abort();
}

inline std::map<uint8_t*, size_t> memory;  // what is allocated: where it begins, and its bytes
inline cudaError_t last_error = cudaSuccess;

// While there is one, the device's memory can be read and written.
struct Open {
  Open() { set(PROT_READ | PROT_WRITE); }
  ~Open() { set(PROT_NONE); }
  static void set(int access) {
    for (const auto& [begin, bytes] : memory) mprotect(begin, bytes, access);
  }
};

inline void check_place(const void* pointer, bool device) {
  const bool is = std::any_of(memory.begin(), memory.end(), [pointer](const auto& part) {
    return pointer >= part.first && pointer < part.first + part.second;
  });
  if (is != device) give_up(device ? "a pointer of the host, not the device" : "a pointer of the device, not the host");
}

// An argument of a kernel.
template <typename T>
void check_argument(const T& argument) {
  if constexpr (std::is_pointer_v<T>) {
    if (argument != nullptr) check_place(argument, true);
  } else if constexpr (std::is_same_v<T, cpm::Matrix>) {
    check_argument(argument.values);
    check_argument(argument.zeros);
    check_argument(argument.scales);
  } else if constexpr (std::is_same_v<T, cpm::NewTokens>) {
    check_argument(argument.ancestors);
  } else if constexpr (std::is_same_v<T, cpm::Kernels>) {
    if (argument.number > 0) check_argument(argument.means);
  }
}

}  // namespace emulated

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
// Once it is asked for it is forgotten, and not before.
inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (bytes > emulated::kMemory) return emulated::last_error = cudaErrorMemoryAllocation;
  *memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*memory == MAP_FAILED) emulated::give_up("no memory");
  emulated::memory[static_cast<uint8_t*>(*memory)] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  const auto found = emulated::memory.find(static_cast<uint8_t*>(memory));
  if (found == emulated::memory.end()) return cudaSuccess;  // NULL
  munmap(memory, found->second);
  emulated::memory.erase(found);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  const emulated::Open open;
  return std::memset(memory, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  emulated::check_place(to, kind == cudaMemcpyHostToDevice);
  emulated::check_place(from, kind == cudaMemcpyDeviceToHost);
  const emulated::Open open;
  return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace emulated {

// longjmp of the C library itself, by its address: what AddressSanitizer puts in its place takes ten times as long.
inline void jump(jmp_buf place) {
  static const auto itself =
      reinterpret_cast<void (*)(jmp_buf, int)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  itself(place, 1);
}

enum class State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it goes on
  bool started = false;
  State state = State::kReady;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint32_t given[2];  // by the last two shuffles
  unsigned shuffles = 0;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void wait(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  if (_setjmp(self.place) == 0) jump(scheduler);
}

inline void enter() {
  for (;;) {
    body();
    wait(State::kDone);
  }
}

// Runs a thread until it waits.
inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) jump(fiber.place);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Lets the threads of a warp go on that have all come to a shuffle; whether they have.
inline bool release_warp(unsigned first) {
  const auto begin = fibers.begin() + first, end = begin + kWarp;
  if (!std::all_of(begin, end, [](const Fiber& fiber) { return fiber.state == State::kAtShuffle; })) return false;
  std::for_each(begin, end, [](Fiber& fiber) { fiber.state = State::kReady; });
  return true;
}

// The same of a block and a barrier; false at its end.
inline bool release_block() {
  const auto all = [](State state) {
    return std::all_of(fibers.begin(), fibers.end(), [state](const Fiber& fiber) { return fiber.state == state; });
  };
  if (all(State::kDone)) return false;
  if (!all(State::kAtBarrier)) give_up("not all threads come to the same barrier or shuffle");
  for (Fiber& fiber : fibers) fiber.state = State::kReady;
  return true;
}

// A warp goes as far as it can before another one begins.
inline void run_block() {
  static const bool backwards = std::getenv("EMULATED_BACKWARDS") != nullptr;
  const auto count = static_cast<unsigned>(fibers.size());
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
    fiber.shuffles = 0;
  }
  do {
    for (unsigned done = 0; done < count; done += kWarp) {
      const unsigned first = backwards ? count - kWarp - done : done;
      do {
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          current = first + (backwards ? kWarp - 1 - lane : lane);
          if (fibers[current].state != State::kReady) continue;
          threadIdx = dim3(current);
          go_on(fibers[current]);
        }
      } while (release_warp(first));
    }
  } while (release_block());
}

}  // namespace emulated

namespace cpm {
inline thread_local float attended[emulated::kSharedFloats];  // dynamic shared memory, by the kernel's name for it
}

namespace emulated {

// kernel<<<grid, block, shared>>>, to be called with the arguments.
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared = 0) {
  if (shared > sizeof cpm::attended) give_up("more than 48 KiB of shared memory");
  return [=](Parameters... arguments) {
    (check_argument(arguments), ...);
    const Open open;
    if (fibers.size() != block.x) fibers = std::vector<Fiber>(block.x);
    body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        std::fill_n(cpm::attended, shared / sizeof(float), std::numeric_limits<float>::quiet_NaN());
        run_block();
      }
    }
  };
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::kAtBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  static_assert(sizeof(T) == 4);
  if (mask != ~0u) emulated::give_up("a shuffle of a part of a warp");
  const unsigned self = emulated::current, turn = emulated::fibers[self].shuffles++ % 2;
  std::memcpy(&emulated::fibers[self].given[turn], &value, 4);
  emulated::wait(emulated::State::kAtShuffle);
  std::memcpy(&value, &emulated::fibers[self ^ static_cast<unsigned>(step)].given[turn], 4);
  return value;
}
