// One allocation for everything: who needs memory says so first, then all get their places in it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cpm {

class MemoryPlan {
 public:
  // In the order in which they lie in the pool, and in which they have to be planned.
  enum Part { kWeights, kActivations, kCache, kParts };

  // Plans `count` values for *place, which `allocated` sets. An error names `what`.
  template <typename T>
  void add(Part part, T** place, uint64_t count, const std::string& what) {
    add_bytes(part, [place](uint8_t* at) { *place = reinterpret_cast<T*>(at); }, count, sizeof(T), what);
  }
  // The same for what is not described by a type; `set` is given the place.
  void add_bytes(Part part, std::function<void(uint8_t*)> set, uint64_t count, uint64_t element_bytes,
                 const std::string& what);

  // Gives everyone their place in a pool of total() bytes.
  void allocated(uint8_t* pool) const {
    for (const Setter& setter : setters_) setter.set(pool + setter.offset);
  }

  uint64_t bytes(Part part) const { return bytes_[part]; }
  uint64_t total() const { return total_; }

 private:
  struct Setter {
    uint64_t offset;
    std::function<void(uint8_t*)> set;
  };

  uint64_t bytes_[kParts] = {};
  uint64_t total_ = 0;
  Part last_ = kWeights;
  std::vector<Setter> setters_;
};

}  // namespace cpm
