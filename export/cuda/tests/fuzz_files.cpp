// fuzz_files FOLDER SCRATCH ROUNDS: opens damaged copies of an exported folder. Each must be an error with a text, or a
// model that computes; built with the sanitizers, a read beyond a file or an overflow ends this program. The damage is
// a function of the round's number, so that what fails once fails again.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "checked.h"
#include "cpm.h"
#include "safetensors.h"

namespace {

namespace fs = std::filesystem;

constexpr int64_t kCapacity = 24;  // of the opened models
const char* const kValues[] = {"0",
                               "-1",
                               "1",
                               "2",
                               "3",
                               "7",
                               "255",
                               "65536",
                               "2147483647",
                               "2147483648",
                               "4294967296",
                               "9223372036854775807",
                               "9223372036854775808",
                               "18446744073709551615",
                               "1e308",
                               "1e-320",
                               "-0.0",
                               "0.5",
                               "null",
                               "true",
                               "false",
                               "[]",
                               "{}",
                               "\"\"",
                               "\"F32\"",
                               "\"I64\"",
                               "\"yarn\"",
                               "\"longrope\"",
                               "[1]",
                               "[0,0]",
                               "[[[[[[]]]]]]",
                               "\"\\u0000\""};

class Damage {
 public:
  explicit Damage(uint32_t round) : random_(round) {}

  size_t below(size_t end) { return end == 0 ? 0 : random_() % end; }

  // Replaces one of the values (numbers, texts, names) of a JSON text, or a few of its bytes.
  void json(std::string& text) {
    std::vector<std::pair<size_t, size_t>> values;
    for (size_t i = 0; i < text.size();) {
      size_t end = i + 1;
      if (text[i] == '"') {
        end = std::min(text.find('"', i + 1), text.size() - 1) + 1;
        values.emplace_back(i, end);
      } else if (std::isalnum(static_cast<unsigned char>(text[i]))) {
        while (end < text.size() && (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '.')) ++end;
        values.emplace_back(i, end);
      }
      i = end;
    }
    if (values.empty() || below(8) == 0) return bytes(text, text.size());
    const auto [begin, end] = values[below(values.size())];
    text.replace(begin, end - begin, kValues[below(std::size(kValues))]);
  }

  // Changes one to four of the first `end` bytes.
  void bytes(std::string& text, size_t end) {
    for (size_t i = below(4) + 1; i > 0 && end > 0; --i) text[below(end)] = static_cast<char>(random_());
  }

  void safetensors(std::string& file) {
    const size_t header = header_length(file);
    switch (below(8)) {
      case 0:
        file.resize(below(file.size() + 1));
        break;
      case 1:
        bytes(file, std::min<size_t>(file.size(), 8));  // the length of the header
        break;
      case 2:
        bytes(file, std::min(file.size(), 8 + header));
        break;
      case 3:
        bytes(file, file.size());
        break;
      default: {
        std::string text = file.substr(8, header);
        json(text);
        file = length_field(text.size()) + text + file.substr(8 + header);
      }
    }
  }

 private:
  static size_t header_length(const std::string& file) {
    size_t length = 0;
    for (size_t i = 8; i > 0; --i) length = length << 8 | static_cast<unsigned char>(file[i - 1]);
    return length;
  }

  static std::string length_field(size_t length) {
    std::string field;
    for (int i = 0; i < 8; ++i) field += static_cast<char>(length >> (8 * i) & 255);
    return field;
  }

  std::mt19937 random_;  // whose numbers the standard fixes
};

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
}

struct Count {
  int accepted = 0, refused = 0;
};

// Parses a file from memory of exactly its size, and reads the ends of every tensor.
void parse(const std::string& file, Count& count) {
  const std::vector<uint8_t> memory(file.begin(), file.end());
  try {
    unsigned sum = 0;
    for (const auto& [name, tensor] : cpm::parse_safetensors(memory.data(), memory.size(), "model.safetensors")) {
      if (tensor.bytes > 0) sum += tensor.data[0] + tensor.data[tensor.bytes - 1];
    }
    count.accepted += sum < ~0u;
  } catch (const cpm::Error& error) {
    if (*error.what() == '\0') throw std::logic_error("an error without a text");
    ++count.refused;
  }
}

// Opens a folder and computes some tokens.
void open(const fs::path& folder, Count& count) {
  const cpm_options options{kCapacity, 5, 1, nullptr, 1};
  cpm_model* model = cpm_open(folder.c_str(), &options);
  if (model == nullptr) {
    if (*cpm_last_error() == '\0') throw std::logic_error("an error without a text");
    ++count.refused;
    return;
  }
  const std::vector<int32_t> tokens(kCapacity - 1, cpm_vocab_size(model) - 1);
  std::vector<float> logits(static_cast<size_t>(cpm_vocab_size(model)));
  std::vector<int32_t> drafts(static_cast<size_t>(cpm_mtp_layers(model)) + 1);
  if (cpm_prefill(model, tokens.data(), kCapacity - 1, logits.data()) != 0 ||
      (cpm_mtp_layers(model) > 0 && cpm_draft(model, 0, drafts.data()) != cpm_mtp_layers(model)) ||
      cpm_decode(model, 0, logits.data()) != 0) {
    throw std::logic_error(cpm_last_error());
  }
  if (cpm_decode(model, 0, logits.data()) == 0) throw std::logic_error("a token beyond the cache was accepted");
  cpm_close(model);
  ++count.accepted;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "fuzz_files FOLDER SCRATCH ROUNDS\n");
    return 2;
  }
  const fs::path folder = argv[1], scratch = argv[2];
  const std::string config = read(folder / "config.json"), weights = read(folder / "model.safetensors");
  const int rounds = std::atoi(argv[3]);
  Count parsed, opened;
  for (int round = 0; round < rounds; ++round) {
    Damage damage(static_cast<uint32_t>(round));
    std::string file = weights;
    damage.safetensors(file);
    parse(file, parsed);
    if (round % 8 != 0) continue;
    const bool damage_config = round % 16 == 0;
    std::string text = config;
    if (damage_config) damage.json(text);
    write(scratch / "config.json", text);
    write(scratch / "model.safetensors", damage_config ? weights : file);
    open(scratch, opened);
  }
  std::printf("parsed %d refused %d; opened %d refused %d\n", parsed.accepted, parsed.refused, opened.accepted,
              opened.refused);
  return 0;
}
