// verify_trees FOLDER TREES BACKEND: verifies random trees around the model's own greedy text, and compares with
// decoding one token after the other: which tokens are accepted, the logits after them, and those after one token more,
// which attend to what was kept in the cache.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpm.h"

namespace {

constexpr int64_t kCapacity = 96;
constexpr int32_t kPrompt = 8;
using Logits = std::vector<float>;

void check(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what + "; last error: " + cpm_last_error());
}

int32_t best(const Logits& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Greedy text, and the logits after each of its tokens.
struct Text {
  std::vector<int32_t> tokens;
  std::vector<Logits> logits;
};

Text decode(cpm_model* model) {
  const int32_t vocabulary = cpm_vocab_size(model);
  Text text;
  while (cpm_length(model) < kCapacity) {
    const auto number = static_cast<int32_t>(text.tokens.size());
    text.tokens.push_back(number < kPrompt ? number * 7 % vocabulary : best(text.logits.back()));
    text.logits.emplace_back(vocabulary);
    check(cpm_decode(model, text.tokens.back(), text.logits.back().data()) == 0, "a token is not decoded");
  }
  return text;
}

double difference(const Logits& a, const Logits& b) {
  double largest = 0, scale = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(a[i]) - b[i]));
    scale = std::max(scale, std::fabs(static_cast<double>(b[i])));
  }
  return largest / scale;
}

struct Tree {
  std::vector<int32_t> tokens, parents;
  std::vector<int32_t> path;  // indices of the tokens that continue the text
};

// A tree after `length` tokens of the text: some of its tokens, and wrong ones before, after and below them.
Tree random_tree(const Text& text, size_t length, int32_t vocabulary, std::mt19937& random) {
  Tree tree{{text.tokens[length]}, {-1}, {0}};
  const size_t count = 1 + random() % std::min<size_t>(64, kCapacity - length);
  while (tree.tokens.size() < count) {
    const size_t next = length + tree.path.size();
    const bool right = random() % 3 == 0 && next < text.tokens.size();
    const auto parent = right ? tree.path.back() : static_cast<int32_t>(random() % tree.tokens.size());
    auto token = static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary));
    if (right) {
      token = text.tokens[next];
      tree.path.push_back(static_cast<int32_t>(tree.tokens.size()));
    } else {  // not by chance the token that would be accepted
      const auto place = std::find(tree.path.begin(), tree.path.end(), parent);
      const size_t follows = length + static_cast<size_t>(place - tree.path.begin()) + 1;
      if (place != tree.path.end() && follows < text.tokens.size() && text.tokens[follows] == token) continue;
    }
    tree.tokens.push_back(token);
    tree.parents.push_back(parent);
  }
  return tree;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "verify_trees FOLDER TREES BACKEND\n");
    return 2;
  }
  try {
    if (std::string(argv[3]) == "cuda") {  // too large for most GPUs: an error that is not that of a later call
      const cpm_options large{1 << 24, 1 << 16, 1, argv[3], 0};
      cpm_close(cpm_open(argv[1], &large));
    }
    const cpm_options options{kCapacity, 16, 1, argv[3], 0};
    cpm_model* model = cpm_open(argv[1], &options);
    check(model != nullptr, "the model is not opened");
    const int32_t vocabulary = cpm_vocab_size(model);
    const Text text = decode(model);
    double largest = 0;
    size_t accepted_in_all = 0;
    std::mt19937 random(1);
    for (int number = 0; number < std::atoi(argv[2]); ++number) {
      const size_t length = kPrompt + random() % (kCapacity - kPrompt - 1);
      check(cpm_truncate(model, 0) == 0, "the cache is not emptied");
      check(cpm_prefill(model, text.tokens.data(), static_cast<int64_t>(length), nullptr) == 0, "no prefill");
      const Tree tree = random_tree(text, length, vocabulary, random);
      std::vector<int32_t> accepted(tree.tokens.size());
      Logits logits(static_cast<size_t>(vocabulary));
      const int32_t count = cpm_verify_tree(model, tree.tokens.data(), tree.parents.data(),
                                            static_cast<int32_t>(tree.tokens.size()), accepted.data(), logits.data());
      check(count > 0, "the tree is not verified");
      accepted.resize(static_cast<size_t>(count));
      check(accepted == tree.path, "other tokens are accepted than decoding would choose");
      size_t end = length + accepted.size();
      check(cpm_length(model) == static_cast<int64_t>(end), "the cache does not hold the accepted tokens");
      largest = std::max(largest, difference(logits, text.logits[end - 1]));
      if (end < text.tokens.size()) {
        check(cpm_decode(model, text.tokens[end], logits.data()) == 0, "no token after the tree");
        largest = std::max(largest, difference(logits, text.logits[end]));
      }
      accepted_in_all += accepted.size() - 1;
    }
    const int32_t root = -1, token = 1;
    int32_t accepted = 0;
    check(cpm_verify_tree(model, &token, &token, 1, &accepted, nullptr) == -1, "a root with a parent was accepted");
    check(cpm_verify_tree(model, &token, &root, 65, &accepted, nullptr) == -1, "a tree of 65 was accepted");
    cpm_close(model);
    std::printf("accepted %zu, largest difference %.3g\n", accepted_in_all, largest);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "verify_trees: %s\n", error.what());
    return 1;
  }
}
