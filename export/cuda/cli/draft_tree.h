// Trees of drafted tokens, and drafts by looking up how the last tokens went on when they stood in the text before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

struct DraftTree {
  std::vector<int32_t> tokens, parents;

  // Adds a continuation of the root, as far as it is not there, while there are less than `most` tokens.
  template <typename Iterator>
  void add(Iterator begin, Iterator end, size_t most) {
    int32_t parent = 0;
    for (; begin != end && tokens.size() < most; ++begin) parent = child(parent, *begin);
  }

 private:
  // The child of a token, which is added where there is none.
  int32_t child(int32_t parent, int32_t token) {
    for (size_t i = 1; i < tokens.size(); ++i) {
      if (parents[i] == parent && tokens[i] == token) return static_cast<int32_t>(i);
    }
    tokens.push_back(token);
    parents.push_back(parent);
    return static_cast<int32_t>(tokens.size()) - 1;
  }
};

// Fills up a tree whose root is the last token of a text to at most `most` tokens. Longer matches, and then later ones,
// have their continuations in it first.
inline void look_up(const std::vector<int32_t>& text, size_t most, DraftTree& tree) {
  constexpr size_t kLongestMatch = 3, kLongestDraft = 8;
  for (size_t match = std::min(kLongestMatch, text.size() - 1); match > 0; --match) {
    for (size_t end = text.size() - 1; end >= match && tree.tokens.size() < most; --end) {  // of an earlier occurrence
      const auto next = text.begin() + static_cast<std::ptrdiff_t>(end);
      if (!std::equal(text.end() - static_cast<std::ptrdiff_t>(match), text.end(),
                      next - static_cast<std::ptrdiff_t>(match))) {
        continue;
      }
      tree.add(next, text.begin() + static_cast<std::ptrdiff_t>(std::min(end + kLongestDraft, text.size())), most);
    }
  }
}
