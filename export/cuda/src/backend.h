// The operations that a decoder is made of. The CPU's loops are the reference; CUDA's kernels do the same.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "config.h"
#include "memory_plan.h"
#include "shared.h"

namespace cpm {

// Pointers are into the pool, except those of `upload` and `download` that are said to be the host's, and weights that
// a CPU reads from mapped files. Activations are float32, a row for each of `count` tokens.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual bool reads_mapped_files() const = 0;
  // What the backend itself needs of the pool, for at most `tokens` at once.
  virtual void plan_scratch(const Config& config, int64_t capacity, int32_t tokens, MemoryPlan& plan) = 0;
  // The pool, zeroed; called once, and freed with the backend.
  virtual uint8_t* allocate(uint64_t bytes) = 0;
  virtual void upload(void* to, const void* from_host, uint64_t bytes) = 0;
  virtual void download(void* to_host, const void* from, uint64_t bytes) = 0;

  // out [count, columns] = multiplier * rows of the table
  virtual void embed(const Matrix& table, const int32_t* tokens, int32_t count, float multiplier, float* out) = 0;
  // out = x / sqrt(mean(x²) + epsilon) * scale, over `width` values; out may be x
  virtual void rms_norm(const float* x, const float* scale, int32_t count, int32_t width, float epsilon,
                        float* out) = 0;
  // out [count, rows] = multiplier * x · weightsᵀ + bias; bias may be NULL
  virtual void linear(const Matrix& weights, const float* bias, const float* x, int32_t count, float multiplier,
                      float* out) = 0;
  // out [count, 2 * width]: of each row that of x, then that of y
  virtual void join(const float* x, const float* y, int32_t count, int32_t width, float* out) = 0;
  // x += multiplier * y
  virtual void add(float* x, const float* y, float multiplier, int64_t size) = 0;
  // gate = silu(gate) * up
  virtual void swiglu(float* gate, const float* up, int64_t size) = 0;
  // Rotates the pairs (i, i + head_dim/2) of each head by its token's angles [count, head_dim/2]; out may be x.
  virtual void rotate(const float* x, const float* cosines, const float* sines, int32_t count, int32_t num_heads,
                      int32_t head_dim, float* out) = 0;

  // Writes heads [count, num_kv_heads, head_dim] to the slots base + i of a layer's cache.
  virtual void store(const Heads& heads, const NewTokens& tokens, const float* x, float* cache) = 0;
  // Moves slot base + indices[i] to base + i; indices ascend.
  virtual void compact(const Heads& heads, int32_t base, const int32_t* indices, int32_t count, float* cache) = 0;
  // Computes the kernels whose last key is one of `count` at positions from `base`, out of a layer's keys.
  virtual void complete_kernels(const Heads& heads, const float* keys, int32_t base, int32_t count,
                                const Kernels& kernels) = 0;
  // Chooses the blocks of each token and key/value head: ascending, then -1, [num_kv_heads, count, num_selected].
  // `keys` are those that kernels are the means of. `coarse` approximates the softmax's normaliser; its size is 0 where
  // that is exact.
  virtual void select_blocks(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys,
                             const Kernels& fine, const Kernels& coarse, const Selection& selection, float scale,
                             int32_t* blocks) = 0;
  // Softmax attention [count, num_heads, head_dim] over what a token sees; over all of it where `blocks` is NULL.
  virtual void attend(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys,
                      const float* values, const int32_t* blocks, const Selection& selection, float scale,
                      float* out) = 0;
};

std::unique_ptr<Backend> make_cpu_backend(int32_t threads);
#ifdef CPM_CUDA
std::unique_ptr<Backend> make_cuda_backend();
#endif

}  // namespace cpm
