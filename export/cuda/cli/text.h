// Text to token ids and back by the tokenizer.json of a folder, which PyTorch's library `tokenizers` reads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class TextTokenizer {
 public:
  // Throws std::runtime_error where the folder has no tokenizer.json that the library reads.
  explicit TextTokenizer(const std::string& folder);
  ~TextTokenizer();

  // Ids of a text that is to be continued, after the token that begins one where tokenizer.json says so.
  std::vector<int32_t> encode(const std::string& text) const;

  // The bytes of a token, which may be a part of a character; none of a special token.
  std::string decode(int32_t token) const;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};
