// The expert ids of a row that another rank can write.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "protocol/limits.h"
#include "protocol/row.h"

namespace efa_ep {

/// A row's ids, read once: what is checked is what is used, even if the row changes in between.
class RowIds {
 public:
  RowIds(const std::byte* row, uint32_t top_k) : count_(top_k) {
    std::memcpy(ids_.data(), row + RowShape::ids_offset(), sizeof(int32_t) * top_k);
    std::atomic_signal_fence(std::memory_order_acq_rel);  // the compiler must not go back to the row
  }
  int32_t operator[](uint32_t slot) const { return ids_[slot]; }
  const int32_t* begin() const { return ids_.data(); }
  const int32_t* end() const { return ids_.data() + count_; }

 private:
  std::array<int32_t, kMaxTopK> ids_;
  uint32_t count_;
};

}  // namespace efa_ep
