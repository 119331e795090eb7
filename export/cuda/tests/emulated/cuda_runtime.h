// Runs CUDA kernels on a CPU, block after block, a block's threads as fibers: for tests where there is no GPU.
//
// A fiber runs until it meets a barrier. Threads of a block that wait at different barriers, or a shuffle that a thread
// of its warp does not come to, end the program: a GPU would hang, or compute anything. With EMULATED_BACKWARDS threads
// run in the opposite order: where a barrier is missing the results differ.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

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

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) { return *memory = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  return std::memset(memory, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 16, kSharedFloats = 12288;  // 48 KiB of the latter

// The compiler's own jumps: those of the C library are slow under AddressSanitizer, which follows them. All other
// threads run during a jump, which is why its callers may not be compiled by what the function itself does (noipa).
using Place = void* [5];

enum class State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
  ucontext_t start;
  Place place;  // where it goes on
  bool started = false;
  State state = State::kReady;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint32_t given[2];  // by the last two shuffles
  unsigned shuffles = 0;
};

inline std::vector<Fiber> fibers;
inline Place scheduler;
inline unsigned current;
inline std::function<void()> body;

[[noreturn]] inline void give_up(const char* what) {
  std::fprintf(stderr, "emulated block %u: %s\n", blockIdx.x, what);
  std::abort();
}

__attribute__((noipa, no_sanitize_address)) inline void wait(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  if (__builtin_setjmp(self.place) == 0) __builtin_longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {
    body();
    wait(State::kDone);
  }
}

// Runs a thread until it waits.
__attribute__((noipa, no_sanitize_address)) inline void go_on(Fiber& fiber) {
  if (__builtin_setjmp(scheduler) != 0) return;
  if (fiber.started) __builtin_longjmp(fiber.place, 1);
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
