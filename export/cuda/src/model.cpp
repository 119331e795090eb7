#include "model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "checked.h"

namespace cpm {
namespace {

constexpr int32_t kUsualChunk = 128, kLongestChunk = 1 << 16;
constexpr int32_t kLogitRows = 64;    // tokens whose logits are computed at once
constexpr int32_t kLargestTree = 64;  // tokens: bits of a mask

std::unique_ptr<Backend> make_backend(const Options& options) {
  if (options.backend == "cpu") return make_cpu_backend(options.threads);
#ifdef CPM_CUDA
  if (options.backend == "cuda") return make_cuda_backend();
  fail("backend = " + options.backend + ": accepted are cpu and cuda");
#else
  fail("backend = " + options.backend + ": accepted is cpu; this library was built without CUDA");
#endif
}

// For each token of a tree the tokens on its path, itself included, as bits.
std::vector<uint64_t> ancestor_masks(const int32_t* parents, int32_t count) {
  std::vector<uint64_t> masks;
  for (int32_t i = 0; i < count; ++i) {
    if (i == 0 ? parents[i] != -1 : parents[i] < 0 || parents[i] >= i) {
      fail("parents[" + std::to_string(i) + "] = " + std::to_string(parents[i]) + ": accepted is " +
           (i == 0 ? "-1 for the root" : "the index of an earlier token"));
    }
    masks.push_back((i == 0 ? 0 : masks[static_cast<size_t>(parents[i])]) | uint64_t{1} << i);
  }
  return masks;
}

int32_t number_of_kernels(int64_t capacity, int64_t size, int64_t stride) {
  return capacity < size ? 0 : static_cast<int32_t>((capacity - size) / stride + 1);
}

}  // namespace

Model::Model(const std::filesystem::path& folder, const Options& options)
    : config_(read_config(folder)), backend_(make_backend(options)), files_(folder) {
  capacity_ = options.capacity == 0 ? config_.max_position_embeddings : options.capacity;
  if (capacity_ < 1 || capacity_ > kLongestSequence) {
    fail("capacity = " + std::to_string(capacity_) + ": accepted are 1 to " + std::to_string(kLongestSequence) +
         " tokens");
  }
  chunk_ = options.chunk == 0 ? kUsualChunk : options.chunk;
  if (chunk_ < 1 || chunk_ > kLongestChunk) {
    fail("chunk = " + std::to_string(chunk_) + ": accepted are 1 to " + std::to_string(kLongestChunk) + " tokens");
  }
  sparse_ = config_.sparse && capacity_ > config_.sparse->dense_len;
  // A chunk or a tree, and before it what MTP layers have not seen the followers of.
  rows_ = std::max(chunk_, kLargestTree) + (options.mtp ? config_.num_nextn_predict_layers : 0);
  heads_ = {config_.num_heads, config_.num_kv_heads, config_.head_dim, static_cast<int32_t>(capacity_)};
  weights_ = std::make_unique<Weights>(files_, config_, options.mtp, *backend_, plan_);
  frequencies_ = inverse_frequencies(config_.rope, config_.head_dim, capacity_);
  plan_activations();
  plan_cache();
  plan_.allocated(backend_->allocate(plan_.total()));
  weights_->load(*backend_);
}

void Model::plan_activations() {
  const auto part = MemoryPlan::kActivations;
  const auto rows = static_cast<uint64_t>(rows_);
  const auto plan = [&](auto** place, uint64_t columns, const char* what) {
    plan_.add(part, place, checked_multiply(rows, columns, what), what);
  };
  const auto q_size = static_cast<uint64_t>(config_.num_heads) * config_.head_dim;
  const auto kv_size = static_cast<uint64_t>(config_.num_kv_heads) * config_.head_dim;
  plan(&tokens_, 1, "tokens");
  plan(&ancestors_, 1, "ancestors");
  plan(&cosines_, config_.head_dim / 2, "cosines");
  plan(&sines_, config_.head_dim / 2, "sines");
  plan(&x_, config_.d_model, "the residual stream");
  plan(&normed_, config_.d_model, "normalised activations");
  plan(&branch_, config_.d_model, "a residual branch");
  plan(&q_, q_size, "queries");
  plan(&k_, kv_size, "keys");
  plan(&v_, kv_size, "values");
  plan(&attended_, q_size, "attended values");
  plan(&gate_, config_.d_ff, "gates");
  plan(&up_, config_.d_ff, "the feed-forward layer");
  if (mtp_layers() > 0) {
    hidden_heads_ = {1, 1, config_.d_model, rows_};
    plan(&hidden_, config_.d_model, "hidden states");
    plan(&joined_, 2 * static_cast<uint64_t>(config_.d_model), "what MTP layers read");
  }
  plan_.add(part, &logits_, checked_multiply(kLogitRows, config_.vocab_size, "logits"), "logits");
  if (sparse_) {
    const Sparse& s = *config_.sparse;
    const int64_t num_blocks = (capacity_ - 1) / s.block_size + 1;
    selection_ = {static_cast<int32_t>(s.block_size),
                  static_cast<int32_t>(s.init_blocks),
                  static_cast<int32_t>(s.num_local()),
                  static_cast<int32_t>(std::min(s.num_selected(), num_blocks)),
                  static_cast<int32_t>(s.block_size / s.kernel_stride),
                  static_cast<int32_t>((s.kernel_size - 1) / s.kernel_stride)};
    plan(&blocks_, checked_multiply(config_.num_kv_heads, selection_.num_selected, "blocks"), "chosen blocks");
    if (s.use_nope) {
      plan(&unrotated_q_, q_size, "unrotated queries");
      plan(&unrotated_k_, kv_size, "unrotated keys");
    }
  }
  backend_->plan_scratch(config_, capacity_, rows_, plan_);
}

void Model::plan_cache() {
  const auto part = MemoryPlan::kCache;
  const auto kv_size = static_cast<uint64_t>(config_.num_kv_heads) * config_.head_dim;
  const auto plan = [&](float** place, int64_t tokens, const char* what) {
    plan_.add(part, place, checked_multiply(kv_size, tokens, what), what);
  };
  caches_.resize(config_.num_layers);
  mtp_caches_.resize(weights_->mtp_layers.size());
  const auto plan_layer = [&](LayerCache& cache) {
    plan(&cache.keys, capacity_, "cached keys");
    plan(&cache.values, capacity_, "cached values");
    if (!sparse_) return;
    const Sparse& s = *config_.sparse;
    if (s.use_nope) plan(&cache.unrotated, capacity_, "cached unrotated keys");
    const auto kernels = [&](int64_t size, int64_t stride, Kernels& made) {
      made = {nullptr, static_cast<int32_t>(size), static_cast<int32_t>(stride),
              number_of_kernels(capacity_, size, stride)};
      plan(&made.means, made.number, "means of keys");
    };
    kernels(s.kernel_size, s.kernel_stride, cache.fine);
    if (s.lse_approximation) kernels(s.coarse_kernel_size(), s.coarse_kernel_stride(), cache.coarse);
  };
  for (LayerCache& cache : caches_) plan_layer(cache);
  for (LayerCache& cache : mtp_caches_) plan_layer(cache);
}

bool Model::ends_text(int32_t token) const {
  const auto& ids = config_.eos_token_ids;
  return std::find(ids.begin(), ids.end(), token) != ids.end();
}

void Model::truncate(int64_t length) {
  if (length < 0 || length > length_) {
    fail("length = " + std::to_string(length) + ": accepted are 0 to the " + std::to_string(length_) +
         " tokens in the cache");
  }
  length_ = length;
  text_.resize(static_cast<size_t>(length));
  settled_ = std::min(settled_, length);
}

void Model::check_tokens(const int32_t* tokens, int64_t count) const {
  if (count < 0 || count > capacity_ - length_) {
    fail(std::to_string(count) + " more tokens: the cache has a capacity of " + std::to_string(capacity_) +
         " and holds " + std::to_string(length_) + "; open the model with a larger one");
  }
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= config_.vocab_size) {
      fail("token " + std::to_string(tokens[i]) + ": accepted are 0 to " + std::to_string(config_.vocab_size - 1));
    }
  }
}

void Model::append(const int32_t* tokens, int64_t count, float* logits, bool each) {
  check_tokens(tokens, count);
  if (count == 0 && logits != nullptr) fail("0 tokens: there are no logits after none of them");
  text_.resize(static_cast<size_t>(length_));  // where an error came before
  text_.insert(text_.end(), tokens, tokens + count);
  for (int64_t first = 0; first < count; first += chunk_) {
    const auto number = static_cast<int32_t>(std::min<int64_t>(chunk_, count - first));
    forward(tokens + first, number, nullptr);
    length_ += number;
    if (logits == nullptr) continue;
    if (each) {
      this->logits(0, number, logits + first * config_.vocab_size);
    } else if (first + number == count) {
      this->logits(number - 1, 1, logits);
    }
  }
}

std::vector<int32_t> Model::verify(const int32_t* tokens, const int32_t* parents, int32_t count, float* logits) {
  if (count < 1 || count > kLargestTree) {
    fail("a tree of " + std::to_string(count) + " tokens: accepted are 1 to " + std::to_string(kLargestTree));
  }
  check_tokens(tokens, count);
  const std::vector<uint64_t> masks = ancestor_masks(parents, count);
  const auto vocab = static_cast<int64_t>(config_.vocab_size);
  forward(tokens, count, masks.data());
  std::vector<float> all(static_cast<size_t>(count * vocab));
  this->logits(0, count, all.data());
  std::vector<int32_t> accepted = {0};
  for (;;) {
    const int32_t last = accepted.back();
    const float* after = all.data() + last * vocab;
    const auto best = static_cast<int32_t>(std::max_element(after, after + vocab) - after);
    int32_t child = last + 1;
    while (child < count && (parents[child] != last || tokens[child] != best)) ++child;
    if (child == count) {
      if (logits != nullptr) std::copy_n(after, vocab, logits);
      break;
    }
    accepted.push_back(child);
  }
  keep(accepted);
  text_.resize(static_cast<size_t>(length_) - accepted.size());
  for (const int32_t index : accepted) text_.push_back(tokens[index]);
  return accepted;
}

std::vector<int32_t> Model::draft(int32_t token) {
  if (mtp_layers() == 0) fail("the model was opened without MTP layers, or has none");
  if (token < 0 || token >= config_.vocab_size) {
    fail("token " + std::to_string(token) + ": accepted are 0 to " + std::to_string(config_.vocab_size - 1));
  }
  if (settled_ == length_) return {};
  text_.resize(static_cast<size_t>(length_));
  text_.push_back(token);
  run_mtp(true);
  const std::vector<int32_t> drafts(text_.begin() + static_cast<std::ptrdiff_t>(length_) + 1, text_.end());
  text_.resize(static_cast<size_t>(length_));
  return drafts;
}

void Model::keep(const std::vector<int32_t>& accepted) {
  const auto base = static_cast<int32_t>(length_), count = static_cast<int32_t>(accepted.size());
  backend_->upload(tokens_, accepted.data(), accepted.size() * sizeof accepted[0]);
  for (LayerCache& cache : caches_) {
    for (float* slots : {cache.keys, cache.values, cache.unrotated}) {
      if (slots != nullptr) backend_->compact(heads_, base, tokens_, count, slots);
    }
    const float* scored = cache.unrotated != nullptr ? cache.unrotated : cache.keys;
    for (const Kernels& kernels : {cache.fine, cache.coarse}) {
      if (kernels.size > 0) backend_->complete_kernels(heads_, scored, base, count, kernels);
    }
  }
  if (hidden_ != nullptr) {
    backend_->compact(hidden_heads_, static_cast<int32_t>(length_ - settled_), tokens_, count, hidden_);
  }
  length_ += count;
}

void Model::rotations(const int32_t* positions, int32_t count) {
  // In double precision, as a float would not hold both the whole turns and the fraction of a far position.
  std::vector<float> cosines, sines;
  for (int32_t t = 0; t < count; ++t) {
    for (const double frequency : frequencies_) {
      const double angle = positions[t] * frequency;
      cosines.push_back(static_cast<float>(std::cos(angle) * config_.rope.attention_factor));
      sines.push_back(static_cast<float>(std::sin(angle) * config_.rope.attention_factor));
    }
  }
  backend_->upload(cosines_, cosines.data(), cosines.size() * sizeof(float));
  backend_->upload(sines_, sines.data(), sines.size() * sizeof(float));
}

void Model::forward(const int32_t* tokens, int32_t count, const uint64_t* ancestors) {
  Backend& run = *backend_;
  if (hidden_ != nullptr && length_ - settled_ > mtp_layers()) run_mtp(false);  // makes room for new hidden states
  const auto base = static_cast<int32_t>(length_);
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  const NewTokens host{count, base, ancestors};
  std::vector<int32_t> positions;
  for (int32_t t = 0; t < count; ++t) positions.push_back(position_of(host, t));
  rotations(positions.data(), count);
  run.upload(tokens_, tokens, static_cast<uint64_t>(count) * sizeof *tokens);
  if (ancestors != nullptr) run.upload(ancestors_, ancestors, static_cast<uint64_t>(count) * sizeof *ancestors);
  const NewTokens placed{count, base, ancestors == nullptr ? nullptr : ancestors_};

  run.embed(weights_->embedding, tokens_, count, static_cast<float>(config_.embedding_multiplier), x_);
  for (size_t i = 0; i < caches_.size(); ++i) block(weights_->layers[i], caches_[i], placed);
  run.rms_norm(x_, weights_->norm, count, config_.d_model, epsilon, normed_);
  if (hidden_ != nullptr) {
    run.store(hidden_heads_, {count, static_cast<int32_t>(base - settled_), nullptr}, normed_, hidden_);
  }
}

void Model::run_mtp(bool draft) {
  Backend& run = *backend_;
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  const auto count = static_cast<int32_t>(length_ - settled_);
  const NewTokens placed{count, static_cast<int32_t>(settled_), nullptr};
  std::vector<int32_t> indices(static_cast<size_t>(count));
  std::iota(indices.begin(), indices.end(), placed.base);
  rotations(indices.data(), count);
  const float* hidden = hidden_;
  for (size_t depth = 0; depth < mtp_caches_.size(); ++depth) {
    const MtpLayer& layer = weights_->mtp_layers[depth];
    for (size_t t = 0; t < indices.size(); ++t) {  // 0 for what is not known yet, which is computed again
      const size_t next = static_cast<size_t>(settled_) + t + depth + 1;
      indices[t] = next < text_.size() ? text_[next] : 0;
    }
    run.upload(tokens_, indices.data(), indices.size() * sizeof indices[0]);
    run.embed(weights_->embedding, tokens_, count, static_cast<float>(config_.embedding_multiplier), x_);
    run.rms_norm(x_, layer.token_norm, count, config_.d_model, epsilon, x_);
    run.rms_norm(hidden, layer.hidden_norm, count, config_.d_model, epsilon, normed_);
    run.join(normed_, x_, count, config_.d_model, joined_);
    run.linear(layer.input_proj, nullptr, joined_, count, 1, x_);
    block(layer.layer, mtp_caches_[depth], placed);
    run.rms_norm(x_, layer.final_norm, count, config_.d_model, epsilon, normed_);
    hidden = normed_;
    if (!draft) continue;
    std::vector<float> after(static_cast<size_t>(config_.vocab_size));
    logits(count - 1, 1, after.data());
    text_.push_back(static_cast<int32_t>(std::max_element(after.begin(), after.end()) - after.begin()));
  }
  // The last layer has not seen what follows the last positions: as many as there are layers.
  const auto left = std::min(count, mtp_layers());
  std::iota(indices.begin(), indices.end(), count - left);
  run.upload(tokens_, indices.data(), static_cast<uint64_t>(left) * sizeof indices[0]);
  run.compact(hidden_heads_, 0, tokens_, left, hidden_);
  settled_ = length_ - left;
}

void Model::block(const Layer& layer, LayerCache& cache, const NewTokens& tokens) {
  Backend& run = *backend_;
  const int32_t count = tokens.count;
  const int64_t width = config_.d_model, hidden = config_.d_ff;
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  const auto residual = static_cast<float>(config_.residual_multiplier);
  run.rms_norm(x_, layer.input_norm, count, config_.d_model, epsilon, normed_);
  attention(layer, cache, tokens);
  run.add(x_, branch_, residual, count * width);
  run.rms_norm(x_, layer.post_attention_norm, count, config_.d_model, epsilon, normed_);
  run.linear(layer.gate, nullptr, normed_, count, 1, gate_);
  run.linear(layer.up, nullptr, normed_, count, 1, up_);
  run.swiglu(gate_, up_, count * hidden);
  run.linear(layer.down, nullptr, gate_, count, 1, branch_);
  run.add(x_, branch_, residual, count * width);
}

void Model::attention(const Layer& layer, LayerCache& cache, const NewTokens& tokens) {
  Backend& run = *backend_;
  const auto scale = static_cast<float>(config_.attention_multiplier);
  const bool nope = unrotated_q_ != nullptr;
  float *q = nope ? unrotated_q_ : q_, *k = nope ? unrotated_k_ : k_;
  run.linear(layer.q, layer.q_bias, normed_, tokens.count, 1, q);
  run.linear(layer.k, layer.k_bias, normed_, tokens.count, 1, k);
  run.linear(layer.v, layer.v_bias, normed_, tokens.count, 1, v_);
  run.rotate(q, cosines_, sines_, tokens.count, config_.num_heads, config_.head_dim, q_);
  run.rotate(k, cosines_, sines_, tokens.count, config_.num_kv_heads, config_.head_dim, k_);
  run.store(heads_, tokens, k_, cache.keys);
  run.store(heads_, tokens, v_, cache.values);
  const int32_t* blocks = nullptr;
  if (sparse_) {
    if (nope) run.store(heads_, tokens, k, cache.unrotated);
    const float* scored = nope ? cache.unrotated : cache.keys;
    if (tokens.ancestors == nullptr) {
      run.complete_kernels(heads_, scored, tokens.base, tokens.count, cache.fine);
      if (cache.coarse.size > 0) run.complete_kernels(heads_, scored, tokens.base, tokens.count, cache.coarse);
    }
    run.select_blocks(heads_, tokens, q, scored, cache.fine, cache.coarse, selection_, scale, blocks_);
    blocks = blocks_;
  }
  run.attend(heads_, tokens, q_, cache.keys, cache.values, blocks, selection_, scale, attended_);
  run.linear(layer.o, layer.o_bias, attended_, tokens.count, 1, branch_);
}

void Model::logits(int32_t first, int32_t count, float* out) {
  const int64_t width = config_.d_model, vocab = config_.vocab_size;
  const auto multiplier = static_cast<float>(config_.logits_multiplier);
  for (int32_t done = 0; done < count; done += kLogitRows) {
    const int32_t rows = std::min(kLogitRows, count - done);
    backend_->linear(weights_->head, nullptr, normed_ + (first + done) * width, rows, multiplier, logits_);
    backend_->download(out + done * vocab, logits_, static_cast<uint64_t>(rows) * vocab * sizeof(float));
  }
}

}  // namespace cpm
