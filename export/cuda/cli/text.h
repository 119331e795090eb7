// Text to token ids and back by the tokenizer.json of a folder. Two libraries compute it, each for its kind.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.h"

class TextTokenizer {
 public:
  virtual ~TextTokenizer() = default;

  // Ids of a text that is to be continued, after the token that begins one where tokenizer.json says so.
  std::vector<int32_t> encode(const std::string& text) const;

  // The bytes of a token, which may be a part of a character; none of a special token.
  std::string decode(int32_t token) const;

 protected:
  struct Added {
    std::string content;
    bool special;
  };

  explicit TextTokenizer(const cpm::Json& json);

  virtual std::vector<int32_t> ids_of(const std::string& text) const = 0;  // without what begins a text
  virtual std::string bytes_of(int32_t token) const = 0;                   // of special tokens too

  std::map<int32_t, Added> added_;

 private:
  std::vector<int32_t> before_;  // what begins a text
};

// Throws std::runtime_error where the folder has no tokenizer.json that is computed here.
std::unique_ptr<TextTokenizer> open_tokenizer(const std::string& folder);

// A part of tokenizer.json is null, one step, or a sequence of them, which stand in a list of this name.
std::vector<cpm::Json> steps_of(const cpm::Json& json, const std::string& part, const std::string& list);

constexpr char kGiveIds[] = "; give token ids (--ids)";  // ends errors about tokenizers that others compute
