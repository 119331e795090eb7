#include "memory_plan.h"

#include <utility>

#include "checked.h"

namespace cpm {

constexpr uint64_t kAlignment = 256;  // what GPUs like to read from

void MemoryPlan::add_bytes(Part part, std::function<void(uint8_t*)> set, uint64_t count, uint64_t element_bytes,
                           const std::string& what) {
  if (part < last_) fail(what + " is planned after a later part of the pool");
  last_ = part;
  const uint64_t bytes = checked_multiply(count, element_bytes, what);
  const uint64_t padded = checked_add(bytes, (kAlignment - bytes % kAlignment) % kAlignment, what);
  setters_.push_back({total_, std::move(set)});
  total_ = checked_add(total_, padded, what);
  bytes_[part] += padded;
}

}  // namespace cpm
