// Draws tokens from logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

// The most probable token. Throws std::runtime_error where the logits are no numbers, which have no order to sort by.
inline int32_t most_probable(const std::vector<float>& logits) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (!std::isfinite(*largest) || std::any_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x); })) {
    throw std::runtime_error("the logits are no numbers: the weights are damaged, or too large for float32");
  }
  return static_cast<int32_t>(largest - logits.begin());
}

struct Sampling {
  double temperature = 0;  // divides the logits; 0 takes the most probable token
  int64_t top_k = 0;       // keeps the k most probable tokens; 0 keeps all
  double top_p = 1;        // of these keeps the smallest set of the most probable with at least this probability
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling) : sampling_(sampling), random_(sampling.seed) {}

  int32_t draw(const std::vector<float>& logits) {
    const int32_t first = most_probable(logits);
    if (sampling_.temperature == 0) return first;
    const double largest = logits[static_cast<size_t>(first)];
    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), 0);
    const auto before = [&](int32_t a, int32_t b) {  // of equals the first, so that the order is one on every machine
      const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
      return x != y ? x > y : a < b;
    };
    if (sampling_.top_k > 0 && static_cast<size_t>(sampling_.top_k) < order_.size()) {
      const auto end = order_.begin() + static_cast<std::ptrdiff_t>(sampling_.top_k);
      std::partial_sort(order_.begin(), end, order_.end(), before);
      order_.erase(end, order_.end());
    } else if (sampling_.top_p < 1) {
      std::sort(order_.begin(), order_.end(), before);
    }
    weights_.clear();
    for (const int32_t token : order_) {
      weights_.push_back(
          std::exp((static_cast<double>(logits[static_cast<size_t>(token)]) - largest) / sampling_.temperature));
    }
    if (sampling_.top_p < 1) {
      const double wanted = sampling_.top_p * std::accumulate(weights_.begin(), weights_.end(), 0.0);
      size_t kept = 0;
      for (double sum = 0; kept < weights_.size() && sum < wanted; ++kept) sum += weights_[kept];
      weights_.resize(kept);
    }
    const double all = std::accumulate(weights_.begin(), weights_.end(), 0.0);
    double left = std::uniform_real_distribution<double>(0, all)(random_);
    size_t drawn = 0;
    while (drawn + 1 < weights_.size() && left >= weights_[drawn]) left -= weights_[drawn++];
    return order_[drawn];
  }

 private:
  Sampling sampling_;
  std::mt19937_64 random_;
  std::vector<int32_t> order_;
  std::vector<double> weights_;
};
