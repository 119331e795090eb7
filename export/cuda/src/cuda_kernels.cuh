// The operations of backend.h as CUDA kernels. Written to be compared with the CPU's loops line by line: float32
// arithmetic, no tensor cores, one pass over the weights for every eight tokens.
#pragma once

#include "shared.h"

namespace cpm {

constexpr int32_t kWarp = 32;
constexpr int32_t kThreads = 128;  // of a block, in every kernel
constexpr int32_t kTokensTogether = 8;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// ---- sums and maxima over a block; every thread gets the result ----

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <typename Combine>
__device__ float over_block(float value, Combine combine) {
  __shared__ float of_warp[kThreads / kWarp];
  for (int32_t step = kWarp / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();  // what a call before has read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int32_t i = 1; i < kThreads / kWarp; ++i) value = combine(value, of_warp[i]);
  return value;
}

// The largest score, of equal ones that of the lowest block. Every thread gets the block; -1 where there is none.
__device__ inline int32_t best_block(float score, int32_t block) {
  __shared__ float scores[kThreads / kWarp];
  __shared__ int32_t blocks[kThreads / kWarp];
  const auto take_better = [&score, &block](float other_score, int32_t other) {
    if (other >= 0 && (block < 0 || other_score > score || (other_score == score && other < block))) {
      score = other_score;
      block = other;
    }
  };
  for (int32_t step = kWarp / 2; step > 0; step /= 2) {
    const float other_score = __shfl_xor_sync(~0u, score, step);
    const int32_t other = __shfl_xor_sync(~0u, block, step);
    take_better(other_score, other);
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    scores[threadIdx.x / kWarp] = score;
    blocks[threadIdx.x / kWarp] = block;
  }
  __syncthreads();
  score = scores[0];
  block = blocks[0];
  for (int32_t i = 1; i < kThreads / kWarp; ++i) take_better(scores[i], blocks[i]);
  return block;
}

// ---- activations ----

// A block for each token.
template <Format format>
__global__ void embed_kernel(Matrix table, const int32_t* tokens, float multiplier, float* out) {
  for (int32_t i = threadIdx.x; i < table.columns; i += kThreads) {
    out[static_cast<size_t>(blockIdx.x) * table.columns + i] =
        weight<format>(table, tokens[blockIdx.x], i) * multiplier;
  }
}

// A block for each token.
__global__ void rms_norm_kernel(const float* x, const float* scale, int32_t width, float epsilon, float* out) {
  x += static_cast<size_t>(blockIdx.x) * width;
  out += static_cast<size_t>(blockIdx.x) * width;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < width; i += kThreads) squares += x[i] * x[i];
  const float inverse = rsqrtf(over_block(squares, Sum()) / width + epsilon);
  for (int32_t i = threadIdx.x; i < width; i += kThreads) out[i] = x[i] * inverse * scale[i];
}

// A warp for each output and eight tokens: a weight is read, and unpacked, once for all of them.
template <Format format>
__global__ void linear_kernel(Matrix weights, const float* bias, const float* x, int32_t count, float multiplier,
                              float* out) {
  const int32_t lane = threadIdx.x % kWarp;
  const int32_t row = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int32_t first = blockIdx.y * kTokensTogether;
  if (row >= weights.rows) return;  // the whole warp
  const int32_t tokens = min(kTokensTogether, count - first);
  float sums[kTokensTogether] = {};
  for (int32_t column = lane; column < weights.columns; column += kWarp) {
    const float value = weight<format>(weights, row, column);
#pragma unroll
    for (int32_t t = 0; t < kTokensTogether; ++t) {
      if (t < tokens) sums[t] += value * x[static_cast<size_t>(first + t) * weights.columns + column];
    }
  }
#pragma unroll
  for (int32_t t = 0; t < kTokensTogether; ++t) {
    for (int32_t step = kWarp / 2; step > 0; step /= 2) sums[t] += __shfl_xor_sync(~0u, sums[t], step);
    if (lane == 0 && t < tokens) {
      out[static_cast<size_t>(first + t) * weights.rows + row] =
          sums[t] * multiplier + (bias == nullptr ? 0 : bias[row]);
    }
  }
}

// A thread for each value, here and in the kernels below up to `complete_kernels`.
__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void join_kernel(const float* x, const float* y, int64_t values, int32_t width, float* out) {
  const int64_t i = thread_index();
  if (i >= values) return;
  float* row = out + i / width * 2 * width + i % width;
  row[0] = x[i];
  row[width] = y[i];
}

__global__ void add_kernel(float* x, const float* y, float multiplier, int64_t size) {
  const int64_t i = thread_index();
  if (i < size) x[i] += y[i] * multiplier;
}

__global__ void swiglu_kernel(float* gate, const float* up, int64_t size) {
  const int64_t i = thread_index();
  if (i < size) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

// A thread for each pair, so that out may be x.
__global__ void rotate_kernel(const float* x, const float* cosines, const float* sines, int64_t pairs,
                              int32_t num_heads, int32_t half, float* out) {
  const int64_t index = thread_index();
  if (index >= pairs) return;
  const int64_t head = index / half, i = index % half;
  const int64_t angle = head / num_heads * half + i, place = head * 2 * half + i;
  const float first = x[place], second = x[place + half];
  out[place] = first * cosines[angle] - second * sines[angle];
  out[place + half] = second * cosines[angle] + first * sines[angle];
}

// ---- the cache ----

__global__ void store_kernel(Heads heads, NewTokens tokens, const float* x, float* cache) {
  const int64_t index = thread_index(), of_token = static_cast<int64_t>(heads.num_kv_heads) * heads.head_dim;
  if (index >= tokens.count * of_token) return;
  const int64_t token = index / of_token, head = index % of_token / heads.head_dim, i = index % heads.head_dim;
  cache[(head * heads.capacity + tokens.base + token) * heads.head_dim + i] = x[index];
}

// One thread moves a value of all tokens, in their order, as a slot may be read before it is written.
__global__ void compact_kernel(Heads heads, int32_t base, const int32_t* indices, int32_t count, float* cache) {
  const int64_t index = thread_index(), size = heads.head_dim;
  if (index >= heads.num_kv_heads * size) return;
  float* slots = cache + (index / size * heads.capacity + base) * size + index % size;
  for (int64_t i = 0; i < count; ++i) slots[i * size] = slots[indices[i] * size];
}

__global__ void complete_kernels_kernel(Heads heads, const float* keys, int32_t first, int32_t last, Kernels kernels) {
  const int64_t index = thread_index(), size = heads.head_dim, of_head = (last - first) * size;
  if (index >= heads.num_kv_heads * of_head) return;
  const int64_t head = index / of_head, kernel = first + index % of_head / size, i = index % size;
  const float* key = keys + (head * heads.capacity + kernel * kernels.stride) * size + i;
  float total = 0;
  for (int64_t k = 0; k < kernels.size; ++k) total += key[k * size];
  kernels.means[(head * kernels.number + kernel) * size + i] = total / kernels.size;
}

// ---- sparse attention ----

__device__ inline float product(const float* a, const float* b, int32_t size) {
  float total = 0;
  for (int32_t i = 0; i < size; ++i) total += a[i] * b[i];
  return total;
}

// As on the CPU: kernels that reach into a tree differ from path to path and are not stored.
__device__ inline float kernel_product(const float* query, const float* keys, const Kernels& kernels,
                                       const NewTokens& tokens, int32_t token, int64_t index, int32_t size) {
  const int64_t begin = index * kernels.stride, end = begin + kernels.size;
  if (tokens.ancestors == nullptr || end <= tokens.base) return product(query, kernels.means + index * size, size);
  float total = 0;
  for (int64_t p = begin; p < end; ++p) {
    total += product(query, keys + static_cast<int64_t>(slot_of(tokens, token, static_cast<int32_t>(p))) * size, size);
  }
  return total / kernels.size;
}

// The logarithm of the softmax's normaliser over the kernels that a query sees; -inf where it sees none.
__device__ inline float normaliser(const float* query, const float* keys, const Kernels& kernels,
                                   const NewTokens& tokens, int32_t token, int32_t visible, int32_t size, float scale) {
  float maximum = kNegativeInfinity, total = 0;
  for (int32_t j = threadIdx.x; j < visible; j += kThreads) {
    const float score = kernel_product(query, keys, kernels, tokens, token, j, size) * scale;
    const float larger = fmaxf(maximum, score);
    total = total * expf(maximum - larger) + expf(score - larger);
    maximum = larger;
  }
  const float largest = over_block(maximum, Maximum());
  if (largest == kNegativeInfinity) return largest;
  return largest + logf(over_block(total > 0 ? total * expf(maximum - largest) : 0.0f, Sum()));
}

// A block for each token and key/value head. `scores` has room for the kernels and the blocks of each of them.
__global__ void select_blocks_kernel(Heads heads, NewTokens tokens, const float* queries, const float* keys,
                                     Kernels fine, Kernels coarse, Selection selection, float scale, float* scores,
                                     int64_t num_scores, int32_t* blocks) {
  const int32_t token = blockIdx.x / heads.num_kv_heads, head = blockIdx.x % heads.num_kv_heads;
  const int32_t size = heads.head_dim, group = heads.num_heads / heads.num_kv_heads;
  const int32_t position = position_of(tokens, token), own = position / selection.block_size;
  const int32_t visible = visible_kernels(fine, position);
  keys += static_cast<int64_t>(head) * heads.capacity * size;
  fine.means += static_cast<int64_t>(head) * fine.number * size;
  if (coarse.size > 0) coarse.means += static_cast<int64_t>(head) * coarse.number * size;
  float* grouped = scores + blockIdx.x * num_scores;
  float* pooled = grouped + fine.number;

  for (int32_t j = threadIdx.x; j < visible; j += kThreads) grouped[j] = 0;
  for (int32_t g = 0; g < group; ++g) {
    const float* query = queries + (static_cast<int64_t>(token) * heads.num_heads + head * group + g) * size;
    const float norm =
        coarse.size > 0 ? normaliser(query, keys, coarse, tokens, token, visible_kernels(coarse, position), size, scale)
                        : normaliser(query, keys, fine, tokens, token, visible, size, scale);
    if (norm == kNegativeInfinity) continue;  // the whole block: nothing to normalise by yet
    for (int32_t j = threadIdx.x; j < visible; j += kThreads) {
      grouped[j] += expf(kernel_product(query, keys, fine, tokens, token, j, size) * scale - norm);
    }
  }
  __syncthreads();

  // Of the kernels that touch a block the largest. A block that is chosen gets a score below all others.
  constexpr float kChosen = -1;
  int32_t forced = 0;
  for (int32_t block = threadIdx.x; block <= own; block += kThreads) {
    int32_t first, last;
    pool_range(selection, block, first, last);
    float largest = 0;
    for (int32_t j = first; j < min(last, visible); ++j) largest = fmaxf(largest, grouped[j]);
    const bool is = is_forced(selection, block, own);
    pooled[block] = is ? kChosen : largest;
    forced += is;
  }
  const auto number = static_cast<int32_t>(over_block(static_cast<float>(forced), Sum()));
  for (int32_t left = min(selection.num_selected, own + 1) - number; left > 0; --left) {
    __syncthreads();
    float score = kChosen;
    int32_t mine = -1;
    for (int32_t block = threadIdx.x; block <= own; block += kThreads) {
      if (pooled[block] > score) {  // of equal ones the first, which is the lowest
        score = pooled[block];
        mine = block;
      }
    }
    const int32_t best = best_block(score, mine);
    if (threadIdx.x == 0 && best >= 0) pooled[best] = kChosen;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t* chosen = blocks + (static_cast<int64_t>(head) * tokens.count + token) * selection.num_selected;
  int32_t written = 0;
  for (int32_t block = 0; block <= own && written < selection.num_selected; ++block) {
    if (pooled[block] == kChosen) chosen[written++] = block;
  }
  while (written < selection.num_selected) chosen[written++] = -1;
}

// A block for each token and head, with head_dim floats of dynamic shared memory. The running softmax over the
// positions that the token sees, `kThreads` at a time: first a thread computes the score of a position, then a thread
// adds up a dimension.
__global__ void attend_kernel(Heads heads, NewTokens tokens, const float* queries, const float* keys,
                              const float* values, const int32_t* blocks, Selection selection, float scale,
                              float* out) {
  extern __shared__ float attended[];
  __shared__ float shares[kThreads];
  __shared__ int32_t slots[kThreads];
  const int32_t token = blockIdx.x / heads.num_heads, head = blockIdx.x % heads.num_heads;
  const int32_t kv_head = head / (heads.num_heads / heads.num_kv_heads), size = heads.head_dim;
  const int32_t position = position_of(tokens, token);
  const float* query = queries + static_cast<int64_t>(blockIdx.x) * size;
  keys += static_cast<int64_t>(kv_head) * heads.capacity * size;
  values += static_cast<int64_t>(kv_head) * heads.capacity * size;
  if (blocks != nullptr) blocks += (static_cast<int64_t>(kv_head) * tokens.count + token) * selection.num_selected;
  const int64_t candidates =
      blocks == nullptr ? position + 1 : static_cast<int64_t>(selection.num_selected) * selection.block_size;

  for (int32_t i = threadIdx.x; i < size; i += kThreads) attended[i] = 0;
  float maximum = kNegativeInfinity, total = 0;
  for (int64_t first = 0; first < candidates; first += kThreads) {
    const int64_t candidate = first + threadIdx.x;
    int64_t key = candidate < candidates ? candidate : -1;
    if (blocks != nullptr && key >= 0) {
      const int32_t block = blocks[candidate / selection.block_size];
      key = block < 0 ? -1 : static_cast<int64_t>(block) * selection.block_size + candidate % selection.block_size;
    }
    const bool seen = key >= 0 && key <= position;
    const int32_t slot = seen ? slot_of(tokens, token, static_cast<int32_t>(key)) : 0;
    const float score =
        seen ? product(query, keys + static_cast<int64_t>(slot) * size, size) * scale : kNegativeInfinity;
    const float larger = fmaxf(maximum, over_block(score, Maximum()));
    if (larger == kNegativeInfinity) continue;  // the whole block: none of these is seen, nor one before
    const float shrink = expf(maximum - larger), share = seen ? expf(score - larger) : 0;
    shares[threadIdx.x] = share;
    slots[threadIdx.x] = slot;
    total = total * shrink + over_block(share, Sum());  // its barrier also publishes shares and slots
    maximum = larger;
    for (int32_t i = threadIdx.x; i < size; i += kThreads) {
      float sum = attended[i] * shrink;
      for (int32_t s = 0; s < kThreads; ++s) sum += shares[s] * values[static_cast<int64_t>(slots[s]) * size + i];
      attended[i] = sum;
    }
    __syncthreads();  // shares and slots are read
  }
  for (int32_t i = threadIdx.x; i < size; i += kThreads) {
    out[static_cast<int64_t>(blockIdx.x) * size + i] = attended[i] / total;
  }
}

}  // namespace cpm
