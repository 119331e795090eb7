#include "cpu_backend.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "checked.h"

namespace cpm {
namespace {

constexpr int32_t kTileRows = 16;  // rows of weights that a thread unpacks at once
constexpr int32_t kTogether = 4;   // of which so many are multiplied with the same inputs
constexpr int32_t kLanes = 8;
constexpr int32_t kMostThreads = 1024;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline __attribute__((always_inline)) void load(const float* from, Lanes& lanes) {
  std::memcpy(&lanes, from, sizeof lanes);
}

inline float sum(const Lanes& lanes) {
  float total = 0;
  for (int32_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Four sums of products with the same x. Rows beyond `count` repeat the last one.
void dots(const float* x, const float* rows, int32_t count, int64_t stride, int32_t size, float* out) {
  const float* row[kTogether];
  for (int32_t r = 0; r < kTogether; ++r) row[r] = rows + std::min(r, count - 1) * stride;
  Lanes sums[kTogether] = {}, left, right;
  int32_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    load(x + k, left);
    for (int32_t r = 0; r < kTogether; ++r) {
      load(row[r] + k, right);
      sums[r] += left * right;
    }
  }
  for (int32_t r = 0; r < count; ++r) {
    float total = sum(sums[r]);
    for (int32_t rest = k; rest < size; ++rest) total += x[rest] * row[r][rest];
    out[r] = total;
  }
}

template <Format format>
void unpack(const Matrix& weights, int32_t first, int32_t count, float* out) {
  const bool packed = format == Format::kGptq || format == Format::kMarlin;
  const int64_t width = weights.columns;
  if (packed) {  // inputs outside: the words of one input lie together
    for (int32_t column = 0; column < weights.columns; ++column) {
      for (int32_t r = 0; r < count; ++r) out[r * width + column] = weight<format>(weights, first + r, column);
    }
  } else {
    for (int32_t r = 0; r < count; ++r) {
      for (int32_t column = 0; column < weights.columns; ++column) {
        out[r * width + column] = weight<format>(weights, first + r, column);
      }
    }
  }
}

// Rows [first, first + count) of weights as floats: where they lie if they are floats already, else unpacked to `tile`.
const float* rows_of(const Matrix& weights, int32_t first, int32_t count, float* tile) {
  switch (weights.format) {
    case Format::kF32:
      return static_cast<const float*>(weights.values) + static_cast<int64_t>(first) * weights.columns;
    case Format::kBF16:
      unpack<Format::kBF16>(weights, first, count, tile);
      break;
    case Format::kF16:
      unpack<Format::kF16>(weights, first, count, tile);
      break;
    case Format::kGptq:
      unpack<Format::kGptq>(weights, first, count, tile);
      break;
    case Format::kMarlin:
      unpack<Format::kMarlin>(weights, first, count, tile);
      break;
  }
  return tile;
}

int32_t num_threads(int32_t asked) {
  const auto cores = static_cast<int32_t>(std::thread::hardware_concurrency());
  return std::min(asked > 0 ? asked : std::max(cores, 1), kMostThreads);
}

}  // namespace

float dot(const float* a, const float* b, int32_t size) {
  float result;
  dots(a, b, 1, 0, size, &result);
  return result;
}

std::unique_ptr<Backend> make_cpu_backend(int32_t threads) { return std::make_unique<CpuBackend>(threads); }

CpuBackend::CpuBackend(int32_t threads) : threads_(num_threads(threads)) {}

void CpuBackend::plan_scratch(const Config& config, int64_t capacity, int32_t, MemoryPlan& plan) {
  const auto threads = static_cast<uint64_t>(threads_);
  const int64_t attention_width = static_cast<int64_t>(config.num_heads) * config.head_dim;
  const int64_t residual_width = static_cast<int64_t>(config.d_model) * (config.num_nextn_predict_layers > 0 ? 2 : 1);
  const int64_t widest = std::max({residual_width, static_cast<int64_t>(config.d_ff), attention_width});
  row_values_ = kTileRows * widest;
  plan.add(MemoryPlan::kActivations, &rows_, checked_multiply(threads, row_values_, "rows"),
           "unpacked rows of weights");
  if (config.sparse && capacity > config.sparse->dense_len) {
    num_blocks_ = (capacity + config.sparse->block_size - 1) / config.sparse->block_size;
    num_scores_ =
        2 * (capacity / config.sparse->kernel_stride + 1) + num_blocks_;  // of one head, of a group, of blocks
    plan.add(MemoryPlan::kActivations, &scores_, checked_multiply(threads, num_scores_, "scores"), "scores of kernels");
    plan.add(MemoryPlan::kActivations, &order_, checked_multiply(threads, num_blocks_, "order"), "the order of blocks");
  }
}

uint8_t* CpuBackend::allocate(uint64_t bytes) {
  constexpr uint64_t kPage = 4096;
  // Zeroed pages come from the system as they are first touched: an unused part of the cache costs nothing.
  void* memory = bytes > SIZE_MAX - kPage ? nullptr : std::calloc(bytes + kPage, 1);
  if (memory == nullptr) {
    fail("the memory pool of " + std::to_string(bytes) + " bytes cannot be allocated: choose a smaller capacity");
  }
  pool_.reset(static_cast<uint8_t*>(memory));
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return pool_.get() + (kPage - address % kPage) % kPage;
}

void CpuBackend::Free::operator()(uint8_t* memory) const { std::free(memory); }

void CpuBackend::upload(void* to, const void* from_host, uint64_t bytes) { std::memcpy(to, from_host, bytes); }

void CpuBackend::download(void* to_host, const void* from, uint64_t bytes) { std::memcpy(to_host, from, bytes); }

void CpuBackend::embed(const Matrix& table, const int32_t* tokens, int32_t count, float multiplier, float* out) {
  for (int32_t t = 0; t < count; ++t) {
    const float* row = rows_of(table, tokens[t], 1, rows_);
    for (int32_t i = 0; i < table.columns; ++i) out[static_cast<int64_t>(t) * table.columns + i] = row[i] * multiplier;
  }
}

void CpuBackend::rms_norm(const float* x, const float* scale, int32_t count, int32_t width, float epsilon, float* out) {
#pragma omp parallel for num_threads(threads_) if (count > 1)
  for (int32_t t = 0; t < count; ++t) {
    const float* row = x + static_cast<int64_t>(t) * width;
    float* result = out + static_cast<int64_t>(t) * width;
    const float inverse = 1 / std::sqrt(dot(row, row, width) / static_cast<float>(width) + epsilon);
    for (int32_t i = 0; i < width; ++i) result[i] = row[i] * inverse * scale[i];
  }
}

void CpuBackend::linear(const Matrix& weights, const float* bias, const float* x, int32_t count, float multiplier,
                        float* out) {
  const int32_t tiles = (weights.rows - 1) / kTileRows + 1;
#pragma omp parallel for num_threads(threads_) schedule(static)
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t first = tile * kTileRows, height = std::min(kTileRows, weights.rows - first);
    const float* rows = rows_of(weights, first, height, rows_ + omp_get_thread_num() * row_values_);
    for (int32_t t = 0; t < count; ++t) {
      const float* inputs = x + static_cast<int64_t>(t) * weights.columns;
      float* outputs = out + static_cast<int64_t>(t) * weights.rows + first;
      for (int32_t r = 0; r < height; r += kTogether) {
        float products[kTogether];
        const int32_t together = std::min(kTogether, height - r);
        dots(inputs, rows + static_cast<int64_t>(r) * weights.columns, together, weights.columns, weights.columns,
             products);
        for (int32_t i = 0; i < together; ++i) {
          outputs[r + i] = products[i] * multiplier + (bias == nullptr ? 0.0f : bias[first + r + i]);
        }
      }
    }
  }
}

void CpuBackend::join(const float* x, const float* y, int32_t count, int32_t width, float* out) {
  for (int64_t t = 0; t < count; ++t) {
    std::copy_n(x + t * width, width, out + 2 * t * width);
    std::copy_n(y + t * width, width, out + (2 * t + 1) * width);
  }
}

void CpuBackend::add(float* x, const float* y, float multiplier, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] += y[i] * multiplier;
}

void CpuBackend::swiglu(float* gate, const float* up, int64_t size) {
#pragma omp parallel for num_threads(threads_) if (size > 4096)
  for (int64_t i = 0; i < size; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

void CpuBackend::rotate(const float* x, const float* cosines, const float* sines, int32_t count, int32_t num_heads,
                        int32_t head_dim, float* out) {
  const int32_t half = head_dim / 2;
  for (int64_t head = 0; head < static_cast<int64_t>(count) * num_heads; ++head) {
    const float* cosine = cosines + head / num_heads * half;
    const float* sine = sines + head / num_heads * half;
    for (int32_t i = 0; i < half; ++i) {
      const float first = x[head * head_dim + i], second = x[head * head_dim + half + i];
      out[head * head_dim + i] = first * cosine[i] - second * sine[i];
      out[head * head_dim + half + i] = second * cosine[i] + first * sine[i];
    }
  }
}

void CpuBackend::store(const Heads& heads, const NewTokens& tokens, const float* x, float* cache) {
  const int64_t size = heads.head_dim;
  for (int64_t t = 0; t < tokens.count; ++t) {
    for (int64_t head = 0; head < heads.num_kv_heads; ++head) {
      float* slot = cache + (head * heads.capacity + tokens.base + t) * size;
      std::memcpy(slot, x + (t * heads.num_kv_heads + head) * size, static_cast<size_t>(size) * sizeof(float));
    }
  }
}

void CpuBackend::compact(const Heads& heads, int32_t base, const int32_t* indices, int32_t count, float* cache) {
  const int64_t size = heads.head_dim;
  for (int64_t head = 0; head < heads.num_kv_heads; ++head) {
    float* slots = cache + (head * heads.capacity + base) * size;
    for (int64_t i = 0; i < count; ++i) {
      if (indices[i] != i)
        std::memcpy(slots + i * size, slots + indices[i] * size, static_cast<size_t>(size) * sizeof(float));
    }
  }
}

}  // namespace cpm
