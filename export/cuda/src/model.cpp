#include "model.h"

#include <algorithm>
#include <cmath>

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
  heads_ = {config_.num_heads, config_.num_kv_heads, config_.head_dim, static_cast<int32_t>(capacity_)};
  weights_ = std::make_unique<Weights>(files_, config_, *backend_, plan_);
  frequencies_ = inverse_frequencies(config_.rope, config_.head_dim, capacity_);
  plan_activations();
  plan_cache();
  plan_.allocated(backend_->allocate(plan_.total()));
  weights_->load(*backend_);
}

void Model::plan_activations() {
  const auto part = MemoryPlan::kActivations;
  const int32_t tokens = std::max(chunk_, kLargestTree);
  const auto rows = static_cast<uint64_t>(tokens);
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
  backend_->plan_scratch(config_, capacity_, tokens, plan_);
}

void Model::plan_cache() {
  const auto part = MemoryPlan::kCache;
  const auto kv_size = static_cast<uint64_t>(config_.num_kv_heads) * config_.head_dim;
  const auto plan = [&](float** place, int64_t tokens, const char* what) {
    plan_.add(part, place, checked_multiply(kv_size, tokens, what), what);
  };
  caches_.resize(config_.num_layers);
  for (LayerCache& cache : caches_) {
    plan(&cache.keys, capacity_, "cached keys");
    plan(&cache.values, capacity_, "cached values");
    if (!sparse_) continue;
    const Sparse& s = *config_.sparse;
    if (s.use_nope) plan(&cache.unrotated, capacity_, "cached unrotated keys");
    const auto kernels = [&](int64_t size, int64_t stride, Kernels& made) {
      made = {nullptr, static_cast<int32_t>(size), static_cast<int32_t>(stride),
              number_of_kernels(capacity_, size, stride)};
      plan(&made.means, made.number, "means of keys");
    };
    kernels(s.kernel_size, s.kernel_stride, cache.fine);
    if (s.lse_approximation) kernels(s.coarse_kernel_size(), s.coarse_kernel_stride(), cache.coarse);
  }
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
  return accepted;
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
  const auto base = static_cast<int32_t>(length_);
  const int64_t width = config_.d_model, hidden = config_.d_ff;
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  const auto residual = static_cast<float>(config_.residual_multiplier);
  const NewTokens host{count, base, ancestors};
  std::vector<int32_t> positions;
  for (int32_t t = 0; t < count; ++t) positions.push_back(position_of(host, t));
  rotations(positions.data(), count);
  run.upload(tokens_, tokens, static_cast<uint64_t>(count) * sizeof *tokens);
  if (ancestors != nullptr) run.upload(ancestors_, ancestors, static_cast<uint64_t>(count) * sizeof *ancestors);
  const NewTokens placed{count, base, ancestors == nullptr ? nullptr : ancestors_};

  run.embed(weights_->embedding, tokens_, count, static_cast<float>(config_.embedding_multiplier), x_);
  for (size_t i = 0; i < caches_.size(); ++i) {
    const Layer& layer = weights_->layers[i];
    run.rms_norm(x_, layer.input_norm, count, config_.d_model, epsilon, normed_);
    attention(layer, caches_[i], placed);
    run.add(x_, branch_, residual, count * width);
    run.rms_norm(x_, layer.post_attention_norm, count, config_.d_model, epsilon, normed_);
    run.linear(layer.gate, nullptr, normed_, count, 1, gate_);
    run.linear(layer.up, nullptr, normed_, count, 1, up_);
    run.swiglu(gate_, up_, count * hidden);
    run.linear(layer.down, nullptr, gate_, count, 1, branch_);
    run.add(x_, branch_, residual, count * width);
  }
  run.rms_norm(x_, weights_->norm, count, config_.d_model, epsilon, normed_);
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
