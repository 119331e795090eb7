// Drafts by looking up how the last tokens went on when they stood in the text before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

struct DraftTree {
  std::vector<int32_t> tokens, parents;

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

// A tree of at most `most` tokens whose root is the last token of a text that is not empty. Longer matches, and then
// later ones, have their continuations in it first.
inline DraftTree draft_tree(const std::vector<int32_t>& text, size_t most) {
  constexpr size_t kLongestMatch = 3, kLongestDraft = 8;
  DraftTree tree{{text.back()}, {-1}};
  for (size_t match = std::min(kLongestMatch, text.size() - 1); match > 0; --match) {
    for (size_t end = text.size() - 1; end >= match; --end) {  // of an earlier occurrence
      if (!std::equal(text.end() - static_cast<std::ptrdiff_t>(match), text.end(),
                      text.begin() + static_cast<std::ptrdiff_t>(end - match))) {
        continue;
      }
      int32_t parent = 0;
      for (size_t i = end; i < std::min(end + kLongestDraft, text.size()) && tree.tokens.size() < most; ++i) {
        parent = tree.child(parent, text[i]);
      }
      if (tree.tokens.size() >= most) return tree;
    }
  }
  return tree;
}
