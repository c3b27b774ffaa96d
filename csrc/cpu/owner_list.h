// The local owners of one row's experts.
#pragma once

#include <array>
#include <cstdint>

#include "protocol/limits.h"

namespace efa_ep {

/// Indices of ranks inside their node, ascending, each once; at most one per expert of a row.
class OwnerList {
 public:
  void insert(uint32_t index) {
    uint32_t place = count_;
    while (place > 0 && indices_[place - 1] > index) --place;
    if (place > 0 && indices_[place - 1] == index) return;
    for (uint32_t i = count_; i > place; --i) indices_[i] = indices_[i - 1];
    indices_[place] = index;
    ++count_;
  }
  const uint32_t* begin() const { return indices_.data(); }
  const uint32_t* end() const { return indices_.data() + count_; }

 private:
  std::array<uint32_t, kMaxTopK> indices_;
  uint32_t count_ = 0;
};

}  // namespace efa_ep
