#include "sentencepiece_text.h"

#include <sentencepiece_model.pb.h>
#include <sentencepiece_processor.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "checked.h"

namespace {

using cpm::Json;
using sentencepiece::ModelProto;

constexpr char kSpace[] = "\xe2\x96\x81";  // U+2581, which stands for a space
constexpr size_t kLongest = 512;           // bytes of a token that is made by merges

[[noreturn]] void refuse(const Json& value, const std::string& accepted) { value.refuse(accepted + kGiveIds); }

std::string replaced(const std::string& text, const std::string& what, const std::string& by) {
  std::string result;
  size_t from = 0;
  for (size_t at; (at = text.find(what, from)) != std::string::npos; from = at + what.size()) {
    result.append(text, from, at - from).append(by);
  }
  return result.append(text, from);
}

std::string name_of(int byte) {
  char name[8];
  std::snprintf(name, sizeof(name), "<0x%02X>", static_cast<unsigned>(byte));
  return name;
}

// A token as text, or the byte for which it stands.
std::string decoded(const std::string& token) {
  if (token.size() == 6 && token.rfind("<0x", 0) == 0 && token[5] == '>' &&
      std::isxdigit(static_cast<unsigned char>(token[3])) != 0 &&
      std::isxdigit(static_cast<unsigned char>(token[4])) != 0) {
    return std::string(1, static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16)));
  }
  return replaced(token, kSpace, " ");
}

bool begins_character(char byte) { return (byte & 0xC0) != 0x80; }

bool is_character(const std::string& text) { return std::count_if(text.begin(), text.end(), begins_character) == 1; }

// The steps of the normaliser, pre-tokenizer and decoder. Each must say exactly what is computed here.

bool is_type(const Json& step, const std::string& type) { return step.get("type").text() == type; }

bool replaces(const Json& step, const std::string& what, const std::string& by) {
  return is_type(step, "Replace") && step.get("pattern").has("String") &&
         step.get("pattern").get("String").text() == what && step.get("content").text() == by;
}

struct Spaces {
  bool prefix;    // a space is put before each piece of a text
  bool at_first;  // spaces are replaced before added tokens are looked for that say `normalized`
};

Spaces read_spaces(const Json& json) {
  const std::vector<Json> normalizer = steps_of(json, "normalizer", "normalizers");
  const std::vector<Json> pre_tokenizer = steps_of(json, "pre_tokenizer", "pretokenizers");
  const bool prefix = !normalizer.empty() && is_type(normalizer[0], "Prepend");
  if (prefix && normalizer[0].get("prepend").text() != kSpace) refuse(normalizer[0].get("prepend"), kSpace);
  const size_t replace = prefix ? 1 : 0;
  if (normalizer.size() > replace) {
    if (!replaces(normalizer[replace], " ", kSpace) || normalizer.size() > replace + 1) {
      refuse(json.get("normalizer"), std::string("Replace ' ' by '") + kSpace + "', after Prepend or not");
    }
    if (!pre_tokenizer.empty()) refuse(json.get("pre_tokenizer"), "none after this normalizer");
    return {prefix, true};
  }
  if (prefix || pre_tokenizer.size() != 1 || !is_type(pre_tokenizer[0], "Metaspace") ||
      pre_tokenizer[0].get("replacement").text() != kSpace ||
      pre_tokenizer[0].get("prepend_scheme").text() != "never" || pre_tokenizer[0].get("split").flag()) {
    cpm::fail("tokenizer.json: normalizer and pre_tokenizer: accepted are ByteLevel, the normalizer Replace ' ' by '" +
              std::string(kSpace) +
              "' after Prepend or not, and Metaspace with prepend_scheme = never and split = false" + kGiveIds);
  }
  return {false, false};
}

// Strip takes the space away that was put before a text: what continues a text has none such.
void check_decoder(const Json& json) {
  const std::vector<Json> steps = steps_of(json, "decoder", "decoders");
  const auto is_strip = [](const Json& step) {
    return is_type(step, "Strip") && step.get("content").text() == " " && step.get("start").whole(0, INT32_MAX) == 1 &&
           step.get("stop").whole(0, INT32_MAX) == 0;
  };
  if (steps.size() < 3 || steps.size() > 4 || !replaces(steps[0], kSpace, " ") || !is_type(steps[1], "ByteFallback") ||
      !is_type(steps[2], "Fuse") || (steps.size() == 4 && !is_strip(steps[3]))) {
    cpm::fail("tokenizer.json: decoder: accepted are Replace '" + std::string(kSpace) +
              "' by ' ', ByteFallback, Fuse, and Strip of one space at the start or not" + kGiveIds);
  }
}

// The model.

using Vocabulary = std::unordered_map<std::string, int32_t>;

struct Merges {
  std::unordered_map<std::string, size_t> ranks;  // of the tokens that they make
  std::unordered_set<uint64_t> pairs;             // ids
};

uint64_t pair_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right);
}

void check_kind(const Json& model) {
  if (!is_type(model, "BPE")) refuse(model.get("type"), "BPE");
  for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(name)) refuse(model.get(name), "null");
  }
  if (!model.has("byte_fallback") || !model.get("byte_fallback").flag()) {
    cpm::fail(model.where() + ": byte_fallback = false: accepted is true, or a ByteLevel pre-tokenizer" + kGiveIds);
  }
  if (model.has("ignore_merges") && model.get("ignore_merges").flag()) refuse(model.get("ignore_merges"), "false");
}

Vocabulary read_vocabulary(const Json& json) {
  Vocabulary vocabulary;
  std::unordered_set<int32_t> ids;
  for (const std::string& token : json.names()) {
    const auto id = static_cast<int32_t>(json.get(token).whole(0, INT32_MAX));
    if (token.empty()) cpm::fail(json.where() + " has a token without text");
    if (!ids.insert(id).second) cpm::fail(json.where() + " has two tokens of the id " + std::to_string(id));
    vocabulary[token] = id;
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (vocabulary.count(name_of(byte)) == 0) {
      cpm::fail(json.where() + " lacks " + name_of(byte) + ": accepted are vocabularies with all bytes" + kGiveIds);
    }
  }
  return vocabulary;
}

// Older versions of tokenizers save a merge as one text, with a space between.
std::pair<std::string, std::string> parts_of(const Json& merge) {
  if (merge.is_array() && merge.size() == 2) return {merge.at(0).text(), merge.at(1).text()};
  if (merge.is_array()) merge.refuse("two tokens");
  const std::string text = merge.text();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) merge.refuse("two tokens");
  return {text.substr(0, space), text.substr(space + 1)};
}

// SentencePiece knows the rank of a token, not of each merge that makes it.
Merges read_merges(const Json& json, const Vocabulary& vocabulary) {
  std::unordered_set<std::string> bytes;
  for (int byte = 0; byte < 256; ++byte) bytes.insert(name_of(byte));
  Merges merges;
  std::string last;
  for (size_t i = 0; i < json.size(); ++i) {
    const Json merge = json.at(i);
    const auto [left, right] = parts_of(merge);
    const std::string made = left + right;
    for (const std::string* token : {&left, &right, &made}) {
      if (vocabulary.count(*token) == 0) merge.refuse("tokens of the vocabulary that make another one");
      if (bytes.count(*token) != 0) refuse(merge, "tokens that are no bytes");
    }
    if (made.size() > kLongest) refuse(merge, "tokens of at most " + std::to_string(kLongest) + " bytes together");
    if (!merges.ranks.emplace(made, merges.ranks.size()).second && made != last) {
      cpm::fail(merge.where() + " makes \"" + made + "\" at another rank than before: accepted are the merges of " +
                "SentencePiece, where all that make a token stand together" + kGiveIds);
    }
    merges.pairs.insert(pair_of(vocabulary.at(left), vocabulary.at(right)));
    last = made;
  }
  return merges;
}

// SentencePiece joins any two neighbours that make a token, so each such two must be a merge. Neighbours are
// characters, those without a token among them, and what merges made.
void check_all_cuts(const Vocabulary& vocabulary, const Merges& merges) {
  const auto stands = [&](const std::string& text) { return is_character(text) || merges.ranks.count(text) != 0; };
  for (const auto& [token, rank] : merges.ranks) {
    for (size_t place = 1; place < token.size(); ++place) {
      if (!begins_character(token[place])) continue;
      const std::string left = token.substr(0, place), right = token.substr(place);
      if (!stands(left) || !stands(right)) continue;
      const auto first = vocabulary.find(left), second = vocabulary.find(right);
      if (first == vocabulary.end() || second == vocabulary.end() ||
          merges.pairs.count(pair_of(first->second, second->second)) == 0) {
        cpm::fail("tokenizer.json: model: no merge joins \"" + left + "\" and \"" + right +
                  "\", of which it has the whole: accepted are the merges of SentencePiece" + kGiveIds);
      }
    }
  }
}

class SentencePieceText : public TextTokenizer {
 public:
  explicit SentencePieceText(const Json& json) : TextTokenizer(json) {
    const Json model = json.get("model");
    check_kind(model);
    spaces_ = read_spaces(json);
    check_decoder(json);
    const Vocabulary vocabulary = read_vocabulary(model.get("vocab"));
    const Merges merges = read_merges(model.get("merges"), vocabulary);
    check_all_cuts(vocabulary, merges);
    load(vocabulary, merges);
    read_added(json.get("added_tokens"), vocabulary);
  }

 protected:
  // Tokens that are not `normalized` cut the text as it is. What they leave is normalised, each piece by itself, and
  // the others cut that.
  std::vector<int32_t> ids_of(const std::string& text) const override {
    std::vector<int32_t> ids;
    for (const Piece& outer : cut(text, plain_)) {
      if (outer.token >= 0) {
        ids.push_back(outer.token);
        continue;
      }
      for (const Piece& inner : cut(normalised(outer.text), normalised_)) {
        if (inner.token >= 0) {
          ids.push_back(inner.token);
        } else {
          add_ids(replaced(inner.text, " ", kSpace), ids);
        }
      }
    }
    return ids;
  }

  std::string bytes_of(int32_t token) const override {
    const auto found = bytes_.find(token);
    return found == bytes_.end() ? "" : found->second;
  }

 private:
  struct Piece {
    std::string text;
    int32_t token;  // -1: text between tokens
  };
  using ByLength = std::map<size_t, Vocabulary, std::greater<size_t>>;

  // Of the tokens that begin at one place the longest counts.
  static std::vector<Piece> cut(const std::string& text, const ByLength& tokens) {
    std::vector<Piece> pieces;
    size_t from = 0;
    const auto add_text = [&](size_t to) {
      if (to > from) pieces.push_back({text.substr(from, to - from), -1});
    };
    for (size_t at = 0; at < text.size();) {
      size_t length = 0;
      for (const auto& [size, of_this_size] : tokens) {
        const auto found = of_this_size.find(text.substr(at, size));
        if (found == of_this_size.end()) continue;
        add_text(at);
        pieces.push_back({"", found->second});
        length = size;
        from = at + size;
        break;
      }
      at += std::max<size_t>(length, 1);
    }
    add_text(text.size());
    return pieces;
  }

  std::string normalised(const std::string& text) const {
    if (!spaces_.at_first) return text;
    return replaced(spaces_.prefix && !text.empty() ? kSpace + text : text, " ", kSpace);
  }

  void add_ids(const std::string& text, std::vector<int32_t>& ids) const {
    std::vector<int> pieces;
    const auto status = processor_.Encode(text, &pieces);
    if (!status.ok()) cpm::fail("SentencePiece: " + status.ToString());
    std::string read;
    for (const int piece : pieces) {
      ids.push_back(ids_.at(static_cast<size_t>(piece)));
      read += bytes_of(ids.back());
    }
    // The library replaces what is no UTF-8.
    if (read != replaced(text, kSpace, " ")) {
      cpm::fail(std::string("the tokenizer would change a part of this text here") + kGiveIds);
    }
  }

  // Pieces are what a text can become: characters, what merges make, and bytes. Of another token, which no text has,
  // the library would make use all the same.
  void load(const Vocabulary& vocabulary, const Merges& merges) {
    auto proto = std::make_unique<ModelProto>();
    const auto add = [&](const std::string& token, ModelProto::SentencePiece::Type type, float score) {
      auto* piece = proto->add_pieces();
      piece->set_piece(token);
      piece->set_type(type);
      piece->set_score(score);
    };
    for (const auto& [token, id] : vocabulary) {
      bytes_[id] = decoded(token);
      const auto rank = merges.ranks.find(token);
      if (rank == merges.ranks.end() && !is_character(token)) continue;
      // Exact: a file of 100 MB, the largest that is read, has fewer than 2^24 merges.
      add(token, ModelProto::SentencePiece::NORMAL,
          rank == merges.ranks.end() ? 0.0f : -static_cast<float>(rank->second));
      ids_.push_back(id);
    }
    for (int byte = 0; byte < 256; ++byte) {
      add(name_of(byte), ModelProto::SentencePiece::BYTE, 0);
      ids_.push_back(vocabulary.at(name_of(byte)));
    }
    add("\xff", ModelProto::SentencePiece::UNKNOWN, 0);  // it asks for one; a token in JSON cannot have this name
    proto->mutable_trainer_spec()->set_model_type(sentencepiece::TrainerSpec::BPE);
    proto->mutable_trainer_spec()->set_byte_fallback(true);
    auto* normalizer = proto->mutable_normalizer_spec();
    normalizer->set_name("identity");
    normalizer->set_add_dummy_prefix(false);
    normalizer->set_remove_extra_whitespaces(false);
    normalizer->set_escape_whitespaces(false);
    const auto status = processor_.Load(std::move(proto));
    if (!status.ok()) cpm::fail("tokenizer.json: SentencePiece: " + status.ToString());
  }

  // The Python library gives added tokens their ids anew; files that it saved say the same ones.
  void read_added(const Json& tokens, const Vocabulary& vocabulary) {
    auto next = static_cast<int64_t>(vocabulary.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
      const Json token = tokens.at(i);
      for (const char* flag : {"lstrip", "rstrip", "single_word"}) {
        if (token.get(flag).flag()) refuse(token.get(flag), "false");
      }
      const std::string content = token.get("content").text();
      const auto known = vocabulary.find(content);
      const int64_t expected = known == vocabulary.end() ? next : known->second;
      const int64_t id = token.get("id").whole(0, INT32_MAX);
      if (id != expected) refuse(token.get("id"), std::to_string(expected));
      next = std::max(next, id + 1);
      const bool is_normalised = token.get("normalized").flag();
      const std::string found_as = is_normalised ? normalised(content) : content;
      Vocabulary& same_length = (is_normalised ? normalised_ : plain_)[found_as.size()];
      if (!same_length.emplace(found_as, static_cast<int32_t>(id)).second) {
        cpm::fail(token.where() + " is an added token a second time");
      }
      bytes_[static_cast<int32_t>(id)] = decoded(found_as);
    }
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::vector<int32_t> ids_;                        // of the pieces
  std::unordered_map<int32_t, std::string> bytes_;  // by id
  Spaces spaces_{};
  ByLength plain_, normalised_;
};

}  // namespace

std::unique_ptr<TextTokenizer> sentencepiece_tokenizer(const Json& json) {
  return std::make_unique<SentencePieceText>(json);
}
