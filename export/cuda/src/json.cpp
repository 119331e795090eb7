#include "json.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "checked.h"

namespace cpm {
namespace {

constexpr uint64_t kLargestFile = 100'000'000;  // of a JSON file; the largest are tokenizers
constexpr size_t kShown = 60;                   // characters of a value that an error shows
constexpr int kDeepest = 32;                    // lists in lists; the parser's printer calls itself for each

using Value = nlohmann::json;

const Value& value_of(const std::shared_ptr<const void>& pointer) { return *static_cast<const Value*>(pointer.get()); }

}  // namespace

Json Json::parse(const char* text, size_t size, const std::string& where) {
  const auto check_depth = [&where](int depth, Value::parse_event_t, Value&) {
    if (depth > kDeepest) fail(where + " has values nested in more than " + std::to_string(kDeepest) + " others");
    return true;
  };
  try {
    return Json(std::make_shared<const Value>(Value::parse(text, text + size, check_depth)), where);
  } catch (const Value::exception& error) {
    fail(where + " is no JSON: " + error.what());
  }
}

Json Json::read(const std::filesystem::path& file) {
  std::error_code problem;
  const uint64_t size = std::filesystem::file_size(file, problem);
  if (problem) fail(file.string() + " cannot be read: " + problem.message());
  if (size > kLargestFile) fail(file.string() + " has " + std::to_string(size) + " bytes: too large for such a file");
  std::string text(size, '\0');
  std::ifstream stream(file, std::ios::binary);
  if (!stream.read(text.data(), static_cast<std::streamsize>(size))) fail(file.string() + " cannot be read");
  return parse(text.data(), text.size(), file.filename().string());
}

std::string Json::dump() const {
  std::string text = value_of(value_).dump(-1, ' ', false, Value::error_handler_t::replace);
  return text.size() <= kShown ? text : text.substr(0, kShown) + "...";
}

void Json::refuse(const std::string& accepted) const { fail(where_ + " = " + dump() + ": accepted is " + accepted); }

bool Json::is_object() const { return value_of(value_).is_object(); }
bool Json::is_array() const { return value_of(value_).is_array(); }
bool Json::is_text() const { return value_of(value_).is_string(); }
bool Json::is_whole() const { return value_of(value_).is_number_integer(); }

bool Json::has(const std::string& name) const {
  const Value& value = value_of(value_);
  if (!value.is_object()) refuse("an object");
  const auto found = value.find(name);
  return found != value.end() && !found->is_null();
}

Json Json::get(const std::string& name) const {
  if (!has(name)) fail(where_ + " lacks " + name);
  return Json(std::shared_ptr<const void>(value_, &*value_of(value_).find(name)), where_ + ": " + name);
}

std::vector<std::string> Json::names() const {
  const Value& value = value_of(value_);
  if (!value.is_object()) refuse("an object");
  std::vector<std::string> found;
  for (auto entry = value.begin(); entry != value.end(); ++entry) found.push_back(entry.key());
  return found;
}

size_t Json::size() const {
  if (!is_array()) refuse("a list");
  return value_of(value_).size();
}

Json Json::at(size_t index) const {
  if (index >= size()) fail(where_ + " has no entry " + std::to_string(index));
  return Json(std::shared_ptr<const void>(value_, &value_of(value_)[index]),
              where_ + "[" + std::to_string(index) + "]");
}

int64_t Json::whole(int64_t lowest, int64_t highest) const {
  const std::string accepted = "a whole number from " + std::to_string(lowest) + " to " + std::to_string(highest);
  const Value& value = value_of(value_);
  if (!value.is_number_integer()) refuse(accepted);
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
    refuse(accepted);
  }
  const auto number = value.get<int64_t>();
  if (number < lowest || number > highest) refuse(accepted);
  return number;
}

double Json::number(double lowest, double highest) const {
  const Value& value = value_of(value_);
  if (!value.is_number()) refuse("a number");
  const auto number = value.get<double>();
  if (!(number >= lowest && number <= highest)) {
    refuse("a number from " + std::to_string(lowest) + " to " + std::to_string(highest));
  }
  return number;
}

double Json::positive() const {
  const Value& value = value_of(value_);
  const double number = value.is_number() ? value.get<double>() : 0.0;
  if (!(number > 0) || !std::isfinite(number)) refuse("a number above 0");
  return number;
}

bool Json::flag() const {
  if (!value_of(value_).is_boolean()) refuse("true or false");
  return value_of(value_).get<bool>();
}

std::string Json::text() const {
  if (!is_text()) refuse("a text");
  return value_of(value_).get<std::string>();
}

}  // namespace cpm
