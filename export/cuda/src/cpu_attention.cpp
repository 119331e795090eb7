// Attention of the CPU: dense, over the blocks of InfLLM v2 (arXiv 2509.24663, section 3), and along the paths of a
// tree.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_backend.h"

namespace cpm {
namespace {

constexpr int64_t kSlotsTogether = 64;  // whose scores are computed before any is used
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls visit(first, last) for the runs of slots that a token sees, in the order of their positions.
template <typename Visit>
void for_each_run(const NewTokens& tokens, int32_t token, const int32_t* blocks, const Selection& selection,
                  Visit visit) {
  const int32_t position = position_of(tokens, token);
  const auto visit_positions = [&](int32_t first, int32_t last) {
    if (tokens.ancestors == nullptr) {
      visit(first, last);
      return;
    }
    if (first < tokens.base) visit(first, std::min(last, tokens.base));
    for (int32_t p = std::max(first, tokens.base); p < last; ++p) {
      const int32_t slot = slot_of(tokens, token, p);
      visit(slot, slot + 1);
    }
  };
  if (blocks == nullptr) {
    visit_positions(0, position + 1);
    return;
  }
  for (int32_t i = 0; i < selection.num_selected && blocks[i] >= 0; ++i) {
    const int32_t first = blocks[i] * selection.block_size;
    visit_positions(first, std::min(first + selection.block_size, position + 1));
  }
}

// The running softmax of one query (arXiv 2205.14135) over runs of slots.
class RunningSoftmax {
 public:
  RunningSoftmax(const float* query, const float* keys, const float* values, int32_t size, float scale, float* out)
      : query_(query), keys_(keys), values_(values), size_(size), scale_(scale), out_(out) {
    std::fill_n(out_, size_, 0.0f);
  }

  void add(int64_t first, int64_t last) {
    for (; first < last; first += kSlotsTogether) add_some(first, std::min(last - first, kSlotsTogether));
  }

  void finish() {
    for (int32_t i = 0; i < size_; ++i) out_[i] /= total_;
  }

 private:
  void add_some(int64_t first, int64_t count) {
    float scores[kSlotsTogether];
    float maximum = maximum_;
    for (int64_t s = 0; s < count; ++s) {
      scores[s] = dot(query_, keys_ + (first + s) * size_, size_) * scale_;
      maximum = std::max(maximum, scores[s]);
    }
    const float shrink = std::exp(maximum_ - maximum);
    maximum_ = maximum;
    total_ *= shrink;
    for (int32_t i = 0; i < size_; ++i) out_[i] *= shrink;
    for (int64_t s = 0; s < count; ++s) {
      const float share = std::exp(scores[s] - maximum);
      const float* value = values_ + (first + s) * size_;
      total_ += share;
      for (int32_t i = 0; i < size_; ++i) out_[i] += share * value[i];
    }
  }

  const float *query_, *keys_, *values_;
  int32_t size_;
  float scale_;
  float* out_;
  float maximum_ = -kInfinity, total_ = 0;
};

// Product of a query and a kernel. Of a tree the kernels that reach into it are not stored, as they differ from path to
// path; the product with a mean is the mean of the products.
float kernel_product(const float* query, const float* keys, const Kernels& kernels, const NewTokens& tokens,
                     int32_t token, int64_t index, int32_t size) {
  const int64_t begin = index * kernels.stride, end = begin + kernels.size;
  if (tokens.ancestors == nullptr || end <= tokens.base) return dot(query, kernels.means + index * size, size);
  float total = 0;
  for (int64_t p = begin; p < end; ++p) {
    total += dot(query, keys + static_cast<int64_t>(slot_of(tokens, token, static_cast<int32_t>(p))) * size, size);
  }
  return total / static_cast<float>(kernels.size);
}

}  // namespace

void CpuBackend::attend(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys,
                        const float* values, const int32_t* blocks, const Selection& selection, float scale,
                        float* out) {
  const int64_t size = heads.head_dim, group = heads.num_heads / heads.num_kv_heads;
#pragma omp parallel for num_threads(threads_) schedule(dynamic)
  for (int64_t index = 0; index < static_cast<int64_t>(tokens.count) * heads.num_heads; ++index) {
    const int64_t token = index / heads.num_heads, kv_head = index % heads.num_heads / group;
    const int64_t first_value = kv_head * heads.capacity * size;
    const int32_t* chosen =
        blocks == nullptr ? nullptr : blocks + (kv_head * tokens.count + token) * selection.num_selected;
    RunningSoftmax softmax(queries + index * size, keys + first_value, values + first_value, heads.head_dim, scale,
                           out + index * size);
    for_each_run(tokens, static_cast<int32_t>(token), chosen, selection,
                 [&softmax](int64_t first, int64_t last) { softmax.add(first, last); });
    softmax.finish();
  }
}

void CpuBackend::complete_kernels(const Heads& heads, const float* keys, int32_t base, int32_t count,
                                  const Kernels& kernels) {
  const int64_t size = heads.head_dim;
  const int32_t first = visible_kernels(kernels, base - 1), last = visible_kernels(kernels, base + count - 1);
  for (int64_t head = 0; head < heads.num_kv_heads; ++head) {
    for (int64_t index = first; index < last; ++index) {
      float* mean = kernels.means + (head * kernels.number + index) * size;
      const float* key = keys + (head * heads.capacity + index * kernels.stride) * size;
      std::fill_n(mean, size, 0.0f);
      for (int64_t k = 0; k < kernels.size; ++k) {
        for (int64_t i = 0; i < size; ++i) mean[i] += key[k * size + i];
      }
      for (int64_t i = 0; i < size; ++i) mean[i] /= static_cast<float>(kernels.size);
    }
  }
}

void CpuBackend::select_blocks(const Heads& heads, const NewTokens& tokens, const float* queries, const float* keys,
                               const Kernels& fine, const Kernels& coarse, const Selection& selection, float scale,
                               int32_t* blocks) {
  const int32_t size = heads.head_dim, group = heads.num_heads / heads.num_kv_heads;
#pragma omp parallel for num_threads(threads_) schedule(dynamic)
  for (int64_t index = 0; index < static_cast<int64_t>(tokens.count) * heads.num_kv_heads; ++index) {
    const auto token = static_cast<int32_t>(index / heads.num_kv_heads);
    const int64_t head = index % heads.num_kv_heads;
    const int32_t position = position_of(tokens, token), own = position / selection.block_size;
    const float* head_keys = keys + head * heads.capacity * size;
    const Kernels fine_of_head{fine.means + head * fine.number * size, fine.size, fine.stride, fine.number};
    const Kernels coarse_of_head{coarse.means + head * coarse.number * size, coarse.size, coarse.stride, coarse.number};
    const int32_t visible = visible_kernels(fine, position);
    float* scores = scores_ + omp_get_thread_num() * num_scores_;
    float* grouped = scores + fine.number;
    float* pooled = grouped + fine.number;
    int32_t* order = order_ + omp_get_thread_num() * num_blocks_;

    // Per head of the group a softmax over the kernels that the query sees, added up.
    std::fill_n(grouped, visible, 0.0f);
    for (int32_t g = 0; g < group; ++g) {
      const float* query = queries + (static_cast<int64_t>(token) * heads.num_heads + head * group + g) * size;
      float maximum = -kInfinity, total = 0;
      const auto normalise_by = [&maximum, &total](float score) {
        const float larger = std::max(maximum, score);
        total = total * std::exp(maximum - larger) + std::exp(score - larger);
        maximum = larger;
      };
      for (int32_t j = 0; j < visible; ++j) {
        scores[j] = kernel_product(query, head_keys, fine_of_head, tokens, token, j, size) * scale;
        if (coarse.size == 0) normalise_by(scores[j]);
      }
      for (int32_t j = 0; coarse.size > 0 && j < visible_kernels(coarse, position); ++j) {
        normalise_by(kernel_product(query, head_keys, coarse_of_head, tokens, token, j, size) * scale);
      }
      if (total == 0) continue;  // nothing to normalise by yet: all scores are 0
      const float normaliser = maximum + std::log(total);
      for (int32_t j = 0; j < visible; ++j) grouped[j] += std::exp(scores[j] - normaliser);
    }

    // Of the kernels that touch a block the largest; then the best blocks, of equal ones the lowest first.
    int32_t* chosen = blocks + (head * tokens.count + token) * selection.num_selected;
    int32_t number = 0, candidates = 0;
    for (int32_t block = 0; block <= own; ++block) {
      if (is_forced(selection, block, own)) {
        if (number < selection.num_selected) chosen[number++] = block;
        continue;
      }
      int32_t first, last;
      pool_range(selection, block, first, last);
      pooled[block] = 0;
      for (int32_t j = first; j < std::min(last, visible); ++j) pooled[block] = std::max(pooled[block], grouped[j]);
      order[candidates++] = block;
    }
    const int32_t by_score = std::min(selection.num_selected - number, candidates);
    std::partial_sort(order, order + by_score, order + candidates, [pooled](int32_t a, int32_t b) {
      return pooled[a] != pooled[b] ? pooled[a] > pooled[b] : a < b;
    });
    std::copy_n(order, by_score, chosen + number);
    std::sort(chosen, chosen + number + by_score);
    std::fill(chosen + number + by_score, chosen + selection.num_selected, -1);
  }
}

}  // namespace cpm
