// The CPU's operations: plain loops over rows of eight floats, parallel over outputs or over tokens and heads.
#pragma once

#include <memory>

#include "backend.h"

namespace cpm {

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int32_t threads);

  bool reads_mapped_files() const override { return true; }
  void plan_scratch(const Config& config, int64_t capacity, int32_t tokens, MemoryPlan& plan) override;
  uint8_t* allocate(uint64_t bytes) override;
  void upload(void* to, const void* from_host, uint64_t bytes) override;
  void download(void* to_host, const void* from, uint64_t bytes) override;

  void embed(const Matrix& table, const int32_t* tokens, int32_t count, float multiplier, float* out) override;
  void rms_norm(const float* x, const float* scale, int32_t count, int32_t width, float epsilon, float* out) override;
  void linear(const Matrix& weights, const float* bias, const float* x, int32_t count, float multiplier,
              float* out) override;
  void join(const float* x, const float* y, int32_t count, int32_t width, float* out) override;
  void add(float* x, const float* y, float multiplier, int64_t size) override;
  void swiglu(float* gate, const float* up, int64_t size) override;
  void rotate(const float* x, const float* cosines, const float* sines, int32_t count, int32_t num_heads,
              int32_t head_dim, float* out) override;
  void store(const Heads& heads, const NewTokens& tokens, const float* x, float* cache) override;
  void compact(const Heads& heads, int32_t base, const int32_t* indices, int32_t count, float* cache) override;
  void complete_kernels(const Heads& heads, const float* keys, int32_t base, int32_t count,
                        const Kernels& kernels) override;
  void select_blocks(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys,
                     const Kernels& fine, const Kernels& coarse, const Selection& selection, float scale,
                     int32_t* blocks) override;
  void attend(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys, const float* values,
              const int32_t* blocks, const Selection& selection, float scale, float* out) override;

 private:
  struct Free {
    void operator()(uint8_t* memory) const;
  };

  int32_t threads_;
  std::unique_ptr<uint8_t, Free> pool_;
  // Of each thread: unpacked rows of weights; scores of kernels and blocks, and the order of the latter.
  float* rows_ = nullptr;
  float* scores_ = nullptr;
  int32_t* order_ = nullptr;
  int64_t row_values_ = 0, num_scores_ = 0, num_blocks_ = 0;
};

// Sum of products of `size` floats, eight partial sums at a time: the order of the sum does not depend on the machine.
float dot(const float* a, const float* b, int32_t size);

}  // namespace cpm
