// Launches the kernels of cuda_kernels.cuh on the current GPU, in the order of the calls.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "backend.h"
#include "checked.h"
#include "cuda_kernels.cuh"

namespace cpm {
namespace {

void check(cudaError_t result, const std::string& what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // forgets it: who opens a smaller model after this one would find it behind the first launch
  fail("CUDA: " + what + ": " + cudaGetErrorString(result));
}

uint32_t blocks_for(int64_t threads) { return static_cast<uint32_t>((threads + kThreads - 1) / kThreads); }

// Calls launch with the format of the weights as a constant.
template <typename Launch>
void by_format(Format format, Launch launch) {
  switch (format) {
    case Format::kF32:
      return launch(std::integral_constant<Format, Format::kF32>());
    case Format::kBF16:
      return launch(std::integral_constant<Format, Format::kBF16>());
    case Format::kF16:
      return launch(std::integral_constant<Format, Format::kF16>());
    case Format::kGptq:
      return launch(std::integral_constant<Format, Format::kGptq>());
    case Format::kMarlin:
      return launch(std::integral_constant<Format, Format::kMarlin>());
  }
}

class CudaBackend : public Backend {
 public:
  CudaBackend() {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "no GPU");
    if (devices == 0) fail("CUDA: no GPU");
  }
  ~CudaBackend() override { cudaFree(pool_); }

  bool reads_mapped_files() const override { return false; }

  void plan_scratch(const Config& config, int64_t capacity, int32_t tokens, MemoryPlan& plan) override {
    if (!config.sparse || capacity <= config.sparse->dense_len) return;
    num_scores_ = capacity / config.sparse->kernel_stride + 1 + (capacity - 1) / config.sparse->block_size + 1;
    const uint64_t queries = checked_multiply(static_cast<uint64_t>(tokens), config.num_kv_heads, "scores");
    plan.add(MemoryPlan::kActivations, &scores_, checked_multiply(queries, num_scores_, "scores"), "scores of kernels");
  }

  uint8_t* allocate(uint64_t bytes) override {
    check(cudaMalloc(&pool_, bytes), "the memory pool of " + std::to_string(bytes) + " bytes cannot be allocated");
    check(cudaMemset(pool_, 0, bytes), "clearing the memory pool");
    return static_cast<uint8_t*>(pool_);
  }

  void upload(void* to, const void* from_host, uint64_t bytes) override {
    check(cudaMemcpy(to, from_host, bytes, cudaMemcpyHostToDevice), "copying to the GPU");
  }

  void download(void* to_host, const void* from, uint64_t bytes) override {
    check(cudaMemcpy(to_host, from, bytes, cudaMemcpyDeviceToHost), "copying from the GPU");
  }

  void embed(const Matrix& table, const int32_t* tokens, int32_t count, float multiplier, float* out) override {
    by_format(table.format, [&](auto format) {
      embed_kernel<decltype(format)::value><<<count, kThreads>>>(table, tokens, multiplier, out);
    });
    launched("embed");
  }

  void rms_norm(const float* x, const float* scale, int32_t count, int32_t width, float epsilon, float* out) override {
    rms_norm_kernel<<<count, kThreads>>>(x, scale, width, epsilon, out);
    launched("rms_norm");
  }

  void linear(const Matrix& weights, const float* bias, const float* x, int32_t count, float multiplier,
              float* out) override {
    constexpr int32_t kRows = kThreads / kWarp;
    const dim3 grid((weights.rows - 1) / kRows + 1, (count - 1) / kTokensTogether + 1);
    by_format(weights.format, [&](auto format) {
      linear_kernel<decltype(format)::value><<<grid, kThreads>>>(weights, bias, x, count, multiplier, out);
    });
    launched("linear");
  }

  void join(const float* x, const float* y, int32_t count, int32_t width, float* out) override {
    const int64_t values = static_cast<int64_t>(count) * width;
    join_kernel<<<blocks_for(values), kThreads>>>(x, y, values, width, out);
    launched("join");
  }

  void add(float* x, const float* y, float multiplier, int64_t size) override {
    add_kernel<<<blocks_for(size), kThreads>>>(x, y, multiplier, size);
    launched("add");
  }

  void swiglu(float* gate, const float* up, int64_t size) override {
    swiglu_kernel<<<blocks_for(size), kThreads>>>(gate, up, size);
    launched("swiglu");
  }

  void rotate(const float* x, const float* cosines, const float* sines, int32_t count, int32_t num_heads,
              int32_t head_dim, float* out) override {
    const int64_t pairs = static_cast<int64_t>(count) * num_heads * (head_dim / 2);
    rotate_kernel<<<blocks_for(pairs), kThreads>>>(x, cosines, sines, pairs, num_heads, head_dim / 2, out);
    launched("rotate");
  }

  void store(const Heads& heads, const NewTokens& tokens, const float* x, float* cache) override {
    const int64_t values = static_cast<int64_t>(tokens.count) * heads.num_kv_heads * heads.head_dim;
    store_kernel<<<blocks_for(values), kThreads>>>(heads, tokens, x, cache);
    launched("store");
  }

  void compact(const Heads& heads, int32_t base, const int32_t* indices, int32_t count, float* cache) override {
    const int64_t values = static_cast<int64_t>(heads.num_kv_heads) * heads.head_dim;
    compact_kernel<<<blocks_for(values), kThreads>>>(heads, base, indices, count, cache);
    launched("compact");
  }

  void complete_kernels(const Heads& heads, const float* keys, int32_t base, int32_t count,
                        const Kernels& kernels) override {
    const int32_t first = visible_kernels(kernels, base - 1), last = visible_kernels(kernels, base + count - 1);
    if (first == last) return;
    const int64_t values = static_cast<int64_t>(last - first) * heads.num_kv_heads * heads.head_dim;
    complete_kernels_kernel<<<blocks_for(values), kThreads>>>(heads, keys, first, last, kernels);
    launched("complete_kernels");
  }

  void select_blocks(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys,
                     const Kernels& fine, const Kernels& coarse, const Selection& selection, float scale,
                     int32_t* blocks) override {
    select_blocks_kernel<<<tokens.count * heads.num_kv_heads, kThreads>>>(
        heads, tokens, queries, keys, fine, coarse, selection, scale, scores_, num_scores_, blocks);
    launched("select_blocks");
  }

  void attend(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys, const float* values,
              const int32_t* blocks, const Selection& selection, float scale, float* out) override {
    const size_t shared = static_cast<size_t>(heads.head_dim) * sizeof(float);
    attend_kernel<<<tokens.count * heads.num_heads, kThreads, shared>>>(heads, tokens, queries, keys, values, blocks,
                                                                        selection, scale, out);
    launched("attend");
  }

 private:
  static void launched(const char* kernel) { check(cudaGetLastError(), kernel); }

  void* pool_ = nullptr;
  float* scores_ = nullptr;
  int64_t num_scores_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend() { return std::make_unique<CudaBackend>(); }

}  // namespace cpm
