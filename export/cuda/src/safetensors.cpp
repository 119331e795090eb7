#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

#include "checked.h"
#include "json.h"

namespace cpm {
namespace {

constexpr uint64_t kLengthBytes = 8;              // of the header's length, at the beginning of the file
constexpr uint64_t kLongestHeader = 100'000'000;  // of the format
constexpr int64_t kAnyWhole = INT64_MAX;

struct Kind {
  DType dtype;
  uint64_t bytes;  // of an element
};

// Those that are not computed with may lie in a file all the same.
const std::map<std::string, Kind>& kinds() {
  static const std::map<std::string, Kind> known = {
      {"F32", {DType::kF32, 4}},    {"F16", {DType::kF16, 2}},       {"BF16", {DType::kBF16, 2}},
      {"I32", {DType::kI32, 4}},    {"F64", {DType::kOther, 8}},     {"I64", {DType::kOther, 8}},
      {"U64", {DType::kOther, 8}},  {"U32", {DType::kOther, 4}},     {"I16", {DType::kOther, 2}},
      {"U16", {DType::kOther, 2}},  {"I8", {DType::kOther, 1}},      {"U8", {DType::kOther, 1}},
      {"BOOL", {DType::kOther, 1}}, {"F8_E4M3", {DType::kOther, 1}}, {"F8_E5M2", {DType::kOther, 1}},
  };
  return known;
}

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// One entry of a header. `begin` and `end` are its data_offsets, within `available` bytes.
Tensor parse_entry(const Json& entry, uint64_t available, uint64_t& begin, uint64_t& end) {
  Tensor tensor;
  tensor.dtype_name = entry.get("dtype").text();
  const auto kind = kinds().find(tensor.dtype_name);
  if (kind == kinds().end()) entry.get("dtype").refuse("F32, F16, BF16, I32 or another type of safetensors");
  tensor.dtype = kind->second.dtype;
  tensor.bytes = kind->second.bytes;
  const Json shape = entry.get("shape");
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    tensor.shape.push_back(shape.at(axis).whole(0, kAnyWhole));
    tensor.bytes = checked_multiply(tensor.bytes, static_cast<uint64_t>(tensor.shape.back()), shape.where());
  }
  const Json offsets = entry.get("data_offsets");
  if (offsets.size() != 2) offsets.refuse("a begin and an end");
  begin = static_cast<uint64_t>(offsets.at(0).whole(0, kAnyWhole));
  end = static_cast<uint64_t>(offsets.at(1).whole(0, kAnyWhole));
  if (begin > end || end > available) {
    offsets.refuse("a part of the " + std::to_string(available) + " bytes of data that the file has");
  }
  if (end - begin != tensor.bytes) {
    offsets.refuse("a part of " + std::to_string(tensor.bytes) + " bytes, which " + describe(tensor.shape) + " of " +
                   tensor.dtype_name + " takes");
  }
  return tensor;
}

}  // namespace

std::map<std::string, Tensor> parse_safetensors(const uint8_t* data, uint64_t size, const std::string& where) {
  if (size < kLengthBytes) fail(where + " has " + std::to_string(size) + " bytes: no safetensors file is so short");
  uint64_t length = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) length |= static_cast<uint64_t>(data[i]) << (8 * i);
  if (length > kLongestHeader || length > size - kLengthBytes) {
    fail(where + " begins with " + std::to_string(length) + " as the length of its header: accepted are at most " +
         std::to_string(std::min(kLongestHeader, size - kLengthBytes)) +
         "; the file is cut off, or no safetensors file");
  }
  const Json header = Json::parse(reinterpret_cast<const char*>(data + kLengthBytes), length, where + ": header");
  const uint64_t available = size - kLengthBytes - length;
  std::map<std::string, Tensor> tensors;
  std::vector<std::pair<uint64_t, uint64_t>> parts;
  for (const std::string& name : header.names()) {
    if (name == "__metadata__") continue;
    uint64_t begin = 0, end = 0;
    Tensor tensor = parse_entry(header.get(name), available, begin, end);
    tensor.data = data + kLengthBytes + length + begin;
    if (reinterpret_cast<uintptr_t>(tensor.data) % kinds().at(tensor.dtype_name).bytes) {
      fail(where + ": " + name + " begins at byte " + std::to_string(kLengthBytes + length + begin) +
           " of the file, which is not aligned to its type " + tensor.dtype_name +
           ": save it with safetensors 0.3 or later");
    }
    parts.emplace_back(begin, end);
    tensors.emplace(name, std::move(tensor));
  }
  std::sort(parts.begin(), parts.end());
  uint64_t filled = 0;
  for (const auto& [begin, end] : parts) {
    if (begin != filled) {
      fail(where + ": data_offsets " + std::to_string(begin) + " to " + std::to_string(end) +
           (begin < filled ? " overlap another tensor" : " leave a gap before them"));
    }
    filled = end;
  }
  if (filled != available) {
    fail(where + " has " + std::to_string(available) + " bytes of data: its tensors take " + std::to_string(filled));
  }
  return tensors;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  const auto refuse = [&path] { fail(path.string() + " cannot be read: " + std::strerror(errno)); };
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) refuse();
  struct stat status;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(file);
    fail(path.string() + " is no file");
  }
  size_ = static_cast<uint64_t>(status.st_size);
  if (size_ > 0) {
    void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    const int problem = errno;
    close(file);
    errno = problem;
    if (mapped == MAP_FAILED) refuse();
    data_ = static_cast<const uint8_t*>(mapped);
  } else {
    close(file);
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

TensorFiles::TensorFiles(const std::filesystem::path& folder) {
  const auto index = folder / "model.safetensors.index.json";
  if (std::filesystem::exists(index)) {
    const Json weight_map = Json::read(index).get("weight_map");
    std::set<std::string> files;
    for (const std::string& name : weight_map.names()) {
      const Json file = weight_map.get(name);
      // A name that leads out of the folder is none of its files.
      if (std::filesystem::path(file.text()).filename() != file.text()) file.refuse("the name of a file of the folder");
      files.insert(file.text());
    }
    for (const std::string& file : files) add(folder / file);
    for (const std::string& name : weight_map.names()) {
      if (!has(name)) fail("model.safetensors.index.json lists " + name + ", which no file has");
    }
    return;
  }
  for (const char* file : {"model.safetensors", "model_gptq.safetensors"}) {
    if (std::filesystem::exists(folder / file)) {
      add(folder / file);
      return;
    }
  }
  fail(folder.string() + " has no model.safetensors, model.safetensors.index.json or model_gptq.safetensors");
}

void TensorFiles::add(const std::filesystem::path& file) {
  files_.emplace_back(file);
  const std::string where = file.filename().string();
  for (auto& [name, tensor] : parse_safetensors(files_.back().data(), files_.back().size(), where)) {
    if (!tensors_.emplace(name, std::move(tensor)).second) fail(where + ": " + name + " is in another file too");
  }
}

std::vector<std::string> TensorFiles::names() const {
  std::vector<std::string> found;
  for (const auto& entry : tensors_) found.push_back(entry.first);
  return found;
}

const Tensor& TensorFiles::get(const std::string& name, std::initializer_list<DType> dtypes,
                               const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("the weights lack " + name);
  const Tensor& tensor = found->second;
  if (tensor.shape != shape) {
    fail(name + " has the shape " + describe(tensor.shape) + ": config.json asks for " + describe(shape));
  }
  if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
    std::string accepted;
    for (const auto& [text, kind] : kinds()) {
      const bool listed =
          kind.dtype != DType::kOther && std::find(dtypes.begin(), dtypes.end(), kind.dtype) != dtypes.end();
      if (listed) accepted += (accepted.empty() ? "" : ", ") + text;
    }
    fail(name + " has the type " + tensor.dtype_name + ": accepted are " + accepted);
  }
  return tensor;
}

}  // namespace cpm
