#include "text.h"

#include <pytorch/tokenizers/hf_tokenizer.h>

#include <algorithm>
#include <set>

#include "checked.h"
#include "sentencepiece_text.h"

namespace {

// Byte-level BPE, as PyTorch's library `tokenizers` computes it.
class ByteLevelText : public TextTokenizer {
 public:
  ByteLevelText(const std::string& folder, const cpm::Json& json) : TextTokenizer(json) {
    if (tokenizer_.load(folder) != tokenizers::Error::Ok) {
      cpm::fail(std::string("tokenizer.json: its model, pre-tokenizer or decoder is not computed here") + kGiveIds);
    }
    check_merges(json.get("model"));
  }

 protected:
  std::vector<int32_t> ids_of(const std::string& text) const override {
    const auto found = tokenizer_.encode(text, 0, 0);
    if (!found.ok()) cpm::fail("the tokenizer has no tokens for this text");
    std::vector<int32_t> ids;
    std::string read;
    for (const uint64_t id : found.get()) {
      ids.push_back(static_cast<int32_t>(id));
      read += bytes_of(ids.back());
    }
    // The library drops what it has no rule for, such as all that a pattern to split at does not match.
    if (read != text) cpm::fail(std::string("the tokenizer would lose a part of this text here") + kGiveIds);
    return ids;
  }

  // A model may have more ids than its tokenizer has tokens.
  std::string bytes_of(int32_t token) const override {
    const auto found = added_.find(token);
    if (found != added_.end()) return found->second.content;
    const auto text = tokenizer_.decode(0, static_cast<uint64_t>(token));
    return text.ok() ? text.get() : "";
  }

 private:
  // The library takes a piece of a text whole where it is a token, as `ignore_merges` says. Without that a piece is
  // what the merges make of it: the same only where they make every token. Merges of one string, "a b", it passes over.
  void check_merges(const cpm::Json& model) const {
    std::set<std::string> made;
    const cpm::Json merges = model.get("merges");
    for (size_t i = 0; i < merges.size(); ++i) {
      const cpm::Json merge = merges.at(i);
      if (!merge.is_array() || merge.size() != 2) {
        merge.refuse("a list of two tokens, as newer versions of tokenizers save them");
      }
      made.insert(merge.at(0).text() + merge.at(1).text());
    }
    if (model.has("ignore_merges") && model.get("ignore_merges").flag()) return;
    const cpm::Json vocabulary = model.get("vocab");
    for (const std::string& token : vocabulary.names()) {
      const auto id = static_cast<int32_t>(vocabulary.get(token).whole(0, INT32_MAX));
      const auto length = std::count_if(token.begin(), token.end(), [](char byte) { return (byte & 0xC0) != 0x80; });
      if (length > 1 && made.count(token) == 0 && added_.count(id) == 0) {
        cpm::fail(model.where() + ": ignore_merges = false, and no merge makes the token \"" + token +
                  "\": accepted are vocabularies that the merges make" + kGiveIds);
      }
    }
  }

  tokenizers::HFTokenizer tokenizer_;
};

}  // namespace

TextTokenizer::TextTokenizer(const cpm::Json& json) {
  const cpm::Json tokens = json.get("added_tokens");
  for (size_t i = 0; i < tokens.size(); ++i) {
    const cpm::Json token = tokens.at(i);
    const std::string content = token.get("content").text();
    if (content.empty()) cpm::fail("tokenizer.json has an added token without text");  // endless
    added_[static_cast<int32_t>(token.get("id").whole(0, INT32_MAX))] = {content, token.get("special").flag()};
  }
  // The libraries have no post-processors. Those of exported folders are templates, or leave the tokens as they are.
  for (const cpm::Json& step : steps_of(json, "post_processor", "processors")) {
    if (step.get("type").text() != "TemplateProcessing") continue;
    const cpm::Json first = step.get("single").at(0);
    if (!first.has("SpecialToken")) continue;
    const cpm::Json ids = step.get("special_tokens").get(first.get("SpecialToken").get("id").text()).get("ids");
    before_.clear();
    for (size_t i = 0; i < ids.size(); ++i) before_.push_back(static_cast<int32_t>(ids.at(i).whole(0, INT32_MAX)));
  }
}

std::vector<int32_t> TextTokenizer::encode(const std::string& text) const {
  std::vector<int32_t> ids = before_;
  if (text.empty()) return ids;
  const std::vector<int32_t> found = ids_of(text);
  ids.insert(ids.end(), found.begin(), found.end());
  return ids;
}

std::string TextTokenizer::decode(int32_t token) const {
  const auto found = added_.find(token);
  return found != added_.end() && found->second.special ? "" : bytes_of(token);
}

std::unique_ptr<TextTokenizer> open_tokenizer(const std::string& folder) {
  const cpm::Json json = cpm::Json::read(folder + "/tokenizer.json");
  for (const cpm::Json& step : steps_of(json, "pre_tokenizer", "pretokenizers")) {
    if (step.get("type").text() == "ByteLevel") return std::make_unique<ByteLevelText>(folder, json);
  }
  return sentencepiece_tokenizer(json);
}

std::vector<cpm::Json> steps_of(const cpm::Json& json, const std::string& part, const std::string& list) {
  if (!json.has(part)) return {};
  const cpm::Json step = json.get(part);
  if (step.get("type").text() != "Sequence") return {step};
  std::vector<cpm::Json> found;
  const cpm::Json steps = step.get(list);
  for (size_t i = 0; i < steps.size(); ++i) found.push_back(steps.at(i));
  return found;
}
