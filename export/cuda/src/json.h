// JSON values that know where they stand, so that every error names its field. Hides the parser from other files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace cpm {

// A value of a parsed text, which lives as long as any of its values. Everything that does not fit throws Error.
class Json {
 public:
  // `where` is what errors call the text, for example "config.json".
  static Json parse(const char* text, size_t size, const std::string& where);
  static Json read(const std::filesystem::path& file);

  const std::string& where() const { return where_; }
  std::string dump() const;  // shortened, for errors

  bool is_object() const;
  bool is_array() const;
  bool is_text() const;
  bool is_whole() const;

  bool has(const std::string& name) const;  // an object's entry that is there and not null
  Json get(const std::string& name) const;  // that entry
  std::vector<std::string> names() const;   // of an object, null entries too

  size_t size() const;  // of an array
  Json at(size_t index) const;

  int64_t whole(int64_t lowest, int64_t highest) const;
  double number(double lowest, double highest) const;
  double positive() const;  // a finite number above 0
  bool flag() const;
  std::string text() const;

  [[noreturn]] void refuse(const std::string& accepted) const;

 private:
  Json(std::shared_ptr<const void> value, std::string where) : value_(std::move(value)), where_(std::move(where)) {}

  std::shared_ptr<const void> value_;  // the parser's value, which keeps the whole text alive
  std::string where_;
};

}  // namespace cpm
