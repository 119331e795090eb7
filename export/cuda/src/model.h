// A decoder with its sequence: reads prompts in chunks, single tokens, and trees of drafted tokens.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "config.h"
#include "memory_plan.h"
#include "safetensors.h"
#include "weights.h"

namespace cpm {

struct Options {
  int64_t capacity = 0;
  int32_t chunk = 0;
  int32_t threads = 0;
  std::string backend = "cpu";
  bool mtp = false;  // whether MTP layers are loaded, where there are any
};

class Model {
 public:
  Model(const std::filesystem::path& folder, const Options& options);

  const Config& config() const { return config_; }
  const MemoryPlan& plan() const { return plan_; }
  uint64_t mapped_bytes() const { return weights_->mapped_bytes(); }
  int64_t capacity() const { return capacity_; }
  bool is_sparse() const { return sparse_; }
  bool ends_text(int32_t token) const;
  int32_t mtp_layers() const { return static_cast<int32_t>(weights_->mtp_layers.size()); }

  int64_t length() const { return length_; }
  void truncate(int64_t length);

  // Appends tokens a chunk at a time. `logits` is NULL, or takes those after the last token, or after `each` of them.
  void append(const int32_t* tokens, int64_t count, float* logits, bool each);

  // Verifies a tree of drafted tokens in one pass. tokens[0] is the root, the token that follows the cache; a parent
  // comes before its children. From the root on the child is accepted that is the best token after its parent. The
  // accepted ones stay in the cache. Returns their indices; `logits` takes those after the last of them.
  std::vector<int32_t> verify(const int32_t* tokens, const int32_t* parents, int32_t count, float* logits);

  // What MTP layers think follows `token`, which follows the cache: a token of each. None where no token has been read,
  // or none since the cache was truncated to what they had seen.
  std::vector<int32_t> draft(int32_t token);

 private:
  // The cache of one layer.
  struct LayerCache {
    float *keys, *values;
    float* unrotated = nullptr;  // keys before rotation, where blocks are chosen by those
    Kernels fine{}, coarse{};
  };

  void plan_activations();
  void plan_cache();
  void check_tokens(const int32_t* tokens, int64_t count) const;
  // Hidden states of new tokens, normalised for the head; writes the cache, but not length_.
  void forward(const int32_t* tokens, int32_t count, const uint64_t* ancestors);
  // Adds both branches of a layer to the residual stream.
  void block(const Layer& layer, LayerCache& cache, const NewTokens& tokens);
  // Shows the MTP layers the hidden states that are kept; appends to text_ the token that each predicts if `draft`.
  void run_mtp(bool draft);
  void attention(const Layer& layer, LayerCache& cache, const NewTokens& tokens);
  void rotations(const int32_t* positions, int32_t count);
  // Moves accepted tokens of a tree to the slots of their positions.
  void keep(const std::vector<int32_t>& accepted);
  // Logits after `count` of the tokens of the last forward(), from the first-th on.
  void logits(int32_t first, int32_t count, float* out);

  const Config config_;
  const std::unique_ptr<Backend> backend_;
  const TensorFiles files_;
  int64_t capacity_;
  int32_t chunk_;
  int32_t rows_;  // tokens that there are activations for
  bool sparse_;
  Heads heads_;
  Selection selection_{};
  std::vector<double> frequencies_;
  MemoryPlan plan_;
  std::unique_ptr<Weights> weights_;
  std::vector<LayerCache> caches_, mtp_caches_;
  int64_t length_ = 0;

  // MTP layers have seen the positions before settled_ with all tokens that follow them. Hidden states are kept of the
  // others up to length_, as heads of a cache whose first slot is settled_.
  std::vector<int32_t> text_;  // all tokens
  int64_t settled_ = 0;
  Heads hidden_heads_{};
  float *hidden_ = nullptr, *joined_ = nullptr;

  // Activations, a row for each token of a chunk.
  int32_t* tokens_;
  uint64_t* ancestors_;
  float *cosines_, *sines_;
  float *x_, *normed_, *branch_;
  float *q_, *k_, *v_, *attended_;
  float *unrotated_q_ = nullptr, *unrotated_k_ = nullptr;
  int32_t* blocks_ = nullptr;
  float *gate_, *up_, *logits_;
};

}  // namespace cpm
