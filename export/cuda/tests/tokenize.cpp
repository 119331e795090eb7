// tokenize FOLDER FILE: prints the ids of each line of a file, in which \n stands for a line's end, and the text that
// they are decoded to, in turn.
#include <cinttypes>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>

#include "text.h"

namespace {

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size())
    text.replace(at, what.size(), by);
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "tokenize FOLDER FILE\n");
    return 2;
  }
  try {
    const auto tokenizer = open_tokenizer(argv[1]);
    std::ifstream file(argv[2]);
    for (std::string line; std::getline(file, line);) {
      std::string decoded;
      for (const int32_t id : tokenizer->encode(replaced(line, "\\n", "\n"))) {
        std::printf("%" PRId32 " ", id);
        decoded += tokenizer->decode(id);
      }
      const std::string shown = "\n" + replaced(decoded, "\n", "\\n") + "\n";
      std::fwrite(shown.data(), 1, shown.size(), stdout);  // a byte of 0 among them
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tokenize: %s\n", error.what());
    return 1;
  }
}
