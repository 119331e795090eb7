// What a folder's config.json says is computed. What is not computed here is an error with the field's name.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace cpm {

// No sequence, block or window is longer: positions up to here are exact in 24 bits.
constexpr int64_t kLongestSequence = int64_t{1} << 24;
constexpr int64_t kMostMtpLayers = 32;

// Rotary embedding: how fast each pair of dimensions turns.
struct Rope {
  std::string type = "default";  // default, linear, dynamic, yarn, longrope, llama3
  double theta = 10000;
  double factor = 1;
  std::vector<double> short_factor, long_factor;  // longrope: divisors of the head_dim/2 frequencies
  int64_t original_max_position_embeddings = 0;
  double attention_factor = 1;  // on cosines and sines
  double beta_fast = 32, beta_slow = 1;
  bool truncate = true;
  double low_freq_factor = 1, high_freq_factor = 4;
};

// Radians per position of each pair of dimensions. `length` chooses between LongRoPE's factors and stretches dynamic
// NTK's base; it is the cache's capacity, so that all keys that meet in one softmax are rotated alike.
std::vector<double> inverse_frequencies(const Rope& rope, int32_t head_dim, int64_t length);

// Sparse attention, InfLLM v2 (arXiv 2509.24663): which blocks of keys a query attends to.
struct Sparse {
  int64_t kernel_size = 32;    // keys whose mean is scored
  int64_t kernel_stride = 16;  // from one such kernel to the next
  int64_t init_blocks = 1;
  int64_t block_size = 64;
  int64_t window_size = 2048;
  int64_t topk = 64;
  bool use_nope = false;          // blocks are chosen by queries and keys before rotation
  int64_t dense_len = 8192;       // caches of at most so many tokens attend densely
  bool extra_local_block = true;  // the code published with MiniCPM4 sees one local block more
  bool lse_approximation = true;  // the softmax over kernels is normalised by kernels four times as long

  int64_t coarse_kernel_size() const { return 4 * kernel_size; }
  int64_t coarse_kernel_stride() const { return 4 * kernel_stride; }
  int64_t num_local() const { return window_size / block_size + (extra_local_block ? 1 : 0); }
  int64_t num_selected() const { return topk + window_size / block_size; }
};

// 4-bit weights in groups of inputs that share a scale.
struct Quantization {
  int32_t group_size = 0;  // 0: not quantised; -1: one group
};

struct Config {
  int32_t vocab_size, num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim;
  int32_t num_nextn_predict_layers = 0;  // MTP layers
  int64_t max_position_embeddings;
  double rms_norm_eps;
  Rope rope;
  std::optional<Sparse> sparse;
  bool tie_word_embeddings, attention_bias, output_bias;
  double embedding_multiplier = 1;
  double residual_multiplier = 1;
  double logits_multiplier = 1;
  double attention_multiplier;  // on the scores
  Quantization quantization;
  std::vector<int32_t> eos_token_ids;
};

// Reads config.json and, where it is there, generation_config.json.
Config read_config(const std::filesystem::path& folder);

}  // namespace cpm
