// What the CPU's loops and the GPU's kernels have in common: how weights are stored, which tokens see which.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CPM_SHARED __host__ __device__ inline
#else
#define CPM_SHARED inline
#endif

namespace cpm {

// ---- weights ----

enum class Format : int32_t { kF32, kBF16, kF16, kGptq, kMarlin };

// A linear layer's weights, [rows, columns]: a row is an output. All pointers are the backend's.
struct Matrix {
  Format format;
  int32_t rows, columns;
  const void* values;      // plain: [rows, columns]. Packed: words of eight 4-bit codes
  const uint32_t* zeros;   // GPTQ: codes of zero less one, eight outputs in a word [groups, stored_rows/8]
  const uint16_t* scales;  // packed: float16 [groups, stored_rows]
  int32_t group_size;      // packed: inputs that share a scale
  int32_t first_row;       // Marlin fuses several layers: where this one begins, and how many rows all have
  int32_t stored_rows;
};

CPM_SHARED float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CPM_SHARED float bf16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

// The exponent's bias is moved by a multiplication, which makes subnormal numbers right without a branch.
CPM_SHARED float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const float finite = bits_to_float(magnitude) * 5192296858534827628530496329220096.0f;  // 2^112
  const float value = (bits & 0x7c00) == 0x7c00 ? bits_to_float(magnitude | 0x7f800000) : finite;
  return bits & 0x8000 ? -value : value;
}

// GPTQ: a word holds eight consecutive inputs of one output, the first in the lowest bits.
CPM_SHARED float gptq_weight(const Matrix& w, int32_t row, int32_t column) {
  const size_t outputs = static_cast<size_t>(w.stored_rows);
  const auto* words = static_cast<const uint32_t*>(w.values);
  const size_t group = static_cast<size_t>(column / w.group_size);
  const uint32_t code = words[static_cast<size_t>(column / 8) * outputs + row] >> (4 * (column % 8)) & 15;
  // One less than a zero point of 0 is stored as 15.
  const uint32_t zero = ((w.zeros[group * (outputs / 8) + row / 8] >> (4 * (row % 8))) + 1) & 15;
  const int32_t centred = static_cast<int32_t>(code) - static_cast<int32_t>(zero);
  return static_cast<float>(centred) * half_to_float(w.scales[group * outputs + row]);
}

// Marlin: bands of 16 inputs, in them chunks of 64 outputs. Word 4·thread + tile of a chunk holds, of the 16 x 16 tile,
// output thread / 4 of both halves and inputs 2·(thread % 4) + {0, 1, 8, 9}, the even ones in the lower bits.
CPM_SHARED float marlin_weight(const Matrix& w, int32_t row, int32_t column) {
  const int32_t output = w.first_row + row, input = column % 16;
  const int32_t tile = output % 64 / 16, half = output % 16 / 8, pair = input % 8 / 2;
  const int32_t held = 4 * half + 2 * (input / 8) + input % 2;  // which of the thread's eight codes
  const int32_t place = held % 2 ? 4 + held / 2 : held / 2;
  const size_t word = static_cast<size_t>(4 * (4 * (output % 8) + pair) + tile);
  const size_t chunk = static_cast<size_t>(column / 16) * (w.stored_rows / 64) + output / 64;
  const uint32_t code = static_cast<const uint32_t*>(w.values)[128 * chunk + word] >> (4 * place) & 15;
  // The scales of 64 outputs are transposed as an 8 x 8 matrix; of a single group those of 32, as a 4 x 4 one of pairs.
  const int32_t grouped = output / 64 * 64 + 8 * (output % 8) + output % 64 / 8;
  const int32_t single = output / 32 * 32 + 8 * (output % 8 / 2) + 2 * (output % 32 / 8) + output % 2;
  const size_t scale =
      static_cast<size_t>(column / w.group_size) * w.stored_rows + (w.columns > w.group_size ? grouped : single);
  return static_cast<float>(static_cast<int32_t>(code) - 8) * half_to_float(w.scales[scale]);
}

template <Format format>
CPM_SHARED float weight(const Matrix& w, int32_t row, int32_t column) {
  const size_t index = static_cast<size_t>(row) * w.columns + column;
  switch (format) {
    case Format::kF32:
      return static_cast<const float*>(w.values)[index];
    case Format::kBF16:
      return bf16_to_float(static_cast<const uint16_t*>(w.values)[index]);
    case Format::kF16:
      return half_to_float(static_cast<const uint16_t*>(w.values)[index]);
    case Format::kGptq:
      return gptq_weight(w, row, column);
    default:
      return marlin_weight(w, row, column);
  }
}

// ---- new tokens and what they see ----

// Tokens that are computed together. Token i is written to slot base + i. In a chain it has the position base + i and
// sees all before it. In a tree (`ancestors`) bit j of ancestors[i] says that it sees token j, itself included; parents
// come before children, so its d-th ancestor in the order of the bits has the position base + d.
struct NewTokens {
  int32_t count;
  int32_t base;               // tokens in the cache, whose slots are their positions
  const uint64_t* ancestors;  // NULL for a chain
};

CPM_SHARED int32_t count_bits(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

CPM_SHARED int32_t lowest_bit(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(bits)) - 1;
#else
  return __builtin_ctzll(bits);
#endif
}

CPM_SHARED int32_t position_of(const NewTokens& tokens, int32_t token) {
  if (tokens.ancestors == nullptr) return tokens.base + token;
  return tokens.base + count_bits(tokens.ancestors[token]) - 1;
}

// The slot of the key at `position`, at most the token's own, on the token's path.
CPM_SHARED int32_t slot_of(const NewTokens& tokens, int32_t token, int32_t position) {
  if (tokens.ancestors == nullptr || position < tokens.base) return position;
  uint64_t path = tokens.ancestors[token];
  for (int32_t depth = position - tokens.base; depth > 0; --depth) path &= path - 1;
  return tokens.base + lowest_bit(path);
}

// Heads of attention and the cache of one layer. A head's slots lie together: keys [num_kv_heads, capacity, head_dim].
struct Heads {
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t capacity;
};

// Means of consecutive keys, by which sparse attention scores blocks: [num_kv_heads, number, head_dim].
struct Kernels {
  float* means;
  int32_t size, stride, number;
};

// The kernels that lie wholly at or before a position; they are the first ones.
CPM_SHARED int32_t visible_kernels(const Kernels& kernels, int32_t position) {
  if (position + 1 < kernels.size) return 0;
  const int32_t visible = (position + 1 - kernels.size) / kernels.stride + 1;
  return visible < kernels.number ? visible : kernels.number;
}

// How blocks of keys are chosen; the numbers of `Sparse`.
struct Selection {
  int32_t block_size, init_blocks, num_local, num_selected;
  int32_t kernels_per_block;  // stride of the max-pool from kernels to blocks
  int32_t pool_padding;       // kernels that begin before a block and reach into it
};

// The kernels that touch a block: [first, last).
CPM_SHARED void pool_range(const Selection& s, int32_t block, int32_t& first, int32_t& last) {
  const int64_t begin = static_cast<int64_t>(s.kernels_per_block) * block - s.pool_padding;
  first = begin > 0 ? static_cast<int32_t>(begin) : 0;
  last = static_cast<int32_t>(begin + s.kernels_per_block + s.pool_padding);
}

// Whether a query whose own block is `own` sees a block without looking at its score.
CPM_SHARED bool is_forced(const Selection& s, int32_t block, int32_t own) {
  return block < s.init_blocks || block > own - s.num_local;
}

}  // namespace cpm
