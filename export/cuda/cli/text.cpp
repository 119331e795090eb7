#include "text.h"

#include <pytorch/tokenizers/hf_tokenizer.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

namespace {

// Copies of values nested deeper, the library's too, would overflow the stack.
bool check_depth(int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
  if (depth > 64) throw std::runtime_error("tokenizer.json has values nested in more than 64 others");
  return true;
}

}  // namespace

struct TextTokenizer::Parts {
  tokenizers::HFTokenizer tokenizer;
  std::vector<int32_t> before;  // what begins a text
  struct Added {
    std::string content;
    bool special;
  };
  std::map<int32_t, Added> added;

  // The bytes of a token, of special ones too. A model may have more ids than its tokenizer has tokens.
  std::string bytes(int32_t token) const {
    const auto found = added.find(token);
    if (found != added.end()) return found->second.content;
    const auto text = tokenizer.decode(0, static_cast<uint64_t>(token));
    return text.ok() ? text.get() : "";
  }

  // The library takes a piece of a text whole where it is a token, as `ignore_merges` says. Without that a piece is
  // what the merges make of it: the same only where they make every token. Merges of one string, "a b", it passes over.
  void check_merges(const nlohmann::json& model, const std::string& file) const {
    std::set<std::string> made;
    for (const auto& merge : model.at("merges")) {
      if (!merge.is_array() || merge.size() != 2) {
        throw std::runtime_error(file + ": model.merges has " + merge.dump() +
                                 ": accepted are lists of two tokens, as newer versions of tokenizers save them");
      }
      made.insert(merge[0].get<std::string>() + merge[1].get<std::string>());
    }
    if (model.value("ignore_merges", false)) return;
    for (const auto& [token, id] : model.at("vocab").items()) {
      const auto length = std::count_if(token.begin(), token.end(), [](char byte) { return (byte & 0xC0) != 0x80; });
      if (length > 1 && made.count(token) == 0 && added.count(id.get<int32_t>()) == 0) {
        throw std::runtime_error(file + ": model.ignore_merges = false, and no merge makes the token \"" + token +
                                 "\": accepted are vocabularies that the merges make; give token ids (--ids)");
      }
    }
  }
};

TextTokenizer::TextTokenizer(const std::string& folder) : parts_(std::make_unique<Parts>()) {
  const std::string file = folder + "/tokenizer.json";
  try {
    std::ifstream stream(file);
    const auto json = nlohmann::json::parse(stream, check_depth);
    for (const auto& token : json.at("added_tokens")) {
      parts_->added[token.at("id").get<int32_t>()] = {token.at("content"), token.at("special")};
      if (token.at("content") == "") throw std::runtime_error(file + " has an added token without text");  // endless
    }
    // The library has no post-processors. Those of exported folders are templates, or leave the tokens as they are.
    const auto processor = json.value("post_processor", nlohmann::json());
    const bool several = processor.is_object() && processor.at("type") == "Sequence";
    for (const auto& part : several ? processor.at("processors") : nlohmann::json::array({processor})) {
      if (!part.is_object() || part.at("type") != "TemplateProcessing") continue;
      const auto& first = part.at("single").at(0);
      if (first.contains("SpecialToken")) {
        const auto& token = part.at("special_tokens").at(first.at("SpecialToken").at("id").get<std::string>());
        parts_->before = token.at("ids").get<std::vector<int32_t>>();
      }
    }
    if (parts_->tokenizer.load(folder) != tokenizers::Error::Ok) {
      throw std::runtime_error(file +
                               ": its model, pre-tokenizer or decoder is of a kind that is not computed here; "
                               "give token ids (--ids)");
    }
    parts_->check_merges(json.at("model"), file);
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(file + " cannot be read: " + error.what());
  }
}

TextTokenizer::~TextTokenizer() = default;

std::vector<int32_t> TextTokenizer::encode(const std::string& text) const {
  std::vector<int32_t> ids = parts_->before;
  if (text.empty()) return ids;
  const auto found = parts_->tokenizer.encode(text, 0, 0);
  if (!found.ok()) throw std::runtime_error("the tokenizer has no tokens for this text");
  std::string read;
  for (const uint64_t id : found.get()) {
    ids.push_back(static_cast<int32_t>(id));
    read += parts_->bytes(ids.back());
  }
  // The library drops what it has no rule for, such as all that a pattern to split at does not match.
  if (read != text) {
    throw std::runtime_error("the tokenizer would lose a part of this text here; give token ids (--ids)");
  }
  return ids;
}

std::string TextTokenizer::decode(int32_t token) const {
  const auto found = parts_->added.find(token);
  return found != parts_->added.end() && found->second.special ? "" : parts_->bytes(token);
}
