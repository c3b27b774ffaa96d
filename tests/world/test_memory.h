// Memory that stands in for arenas in tests: on the heap, so that the sanitizers watch its bounds.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "protocol/limits.h"

namespace efa_ep {

using Bytes = std::vector<std::byte>;

/// Page-aligned and zero-filled, like an Arena.
class TestMemory {
 public:
  explicit TestMemory(size_t bytes)
      : bytes_(align_up(bytes, kSectionAlignment)),
        data_(static_cast<std::byte*>(std::aligned_alloc(kSectionAlignment, bytes_)), &std::free) {
    std::memset(data_.get(), 0, bytes_);
  }
  std::byte* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  std::unique_ptr<std::byte, void (*)(void*)> data_;
};

}  // namespace efa_ep
