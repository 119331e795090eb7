// The weights of a folder: safetensors files, mapped, with every claim of their headers checked before it is used.
#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

namespace cpm {

enum class DType { kF32, kF16, kBF16, kI32, kOther };

// A tensor of a mapped file; valid as long as its TensorFiles.
struct Tensor {
  DType dtype;
  std::string dtype_name;  // as in the header
  std::vector<int64_t> shape;
  const uint8_t* data;
  uint64_t bytes;
};

// Parses the header of a safetensors file that lies in memory, `size` bytes at `data`. The tensors must fill the rest
// of the file without gaps or overlaps, each as large as its shape and dtype say and aligned to its elements.
// `where` is what errors call the file. Throws Error.
std::map<std::string, Tensor> parse_safetensors(const uint8_t* data, uint64_t size, const std::string& where);

// A file mapped for reading. Whoever shortens it meanwhile ends the program: no reader of mapped files survives that.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

// All tensors of a folder: model.safetensors, the files of its index, or model_gptq.safetensors.
class TensorFiles {
 public:
  explicit TensorFiles(const std::filesystem::path& folder);

  bool has(const std::string& name) const { return tensors_.count(name) > 0; }
  size_t size() const { return tensors_.size(); }
  std::vector<std::string> names() const;

  // The tensor of that name, which must have one of the dtypes and exactly the shape.
  const Tensor& get(const std::string& name, std::initializer_list<DType> dtypes,
                    const std::vector<int64_t>& shape) const;

 private:
  void add(const std::filesystem::path& file);

  std::vector<MappedFile> files_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace cpm
