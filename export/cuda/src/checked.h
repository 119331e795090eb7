// Errors, and arithmetic on sizes that files claim: what does not fit into 64 bits is an error, not a wrap-around.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cpm {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& message) { throw Error(message); }

inline uint64_t checked_multiply(uint64_t a, uint64_t b, const std::string& what) {
  uint64_t product;
  if (__builtin_mul_overflow(a, b, &product)) {
    fail(what + ": " + std::to_string(a) + " times " + std::to_string(b) + " is beyond 64 bits");
  }
  return product;
}

inline uint64_t checked_add(uint64_t a, uint64_t b, const std::string& what) {
  uint64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) {
    fail(what + ": " + std::to_string(a) + " plus " + std::to_string(b) + " is beyond 64 bits");
  }
  return sum;
}

}  // namespace cpm
