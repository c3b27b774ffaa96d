// The bytes of one row. A dispatch row describes itself; a combine row is bare payload, because both ends can
// derive its token from the dispatch rows of the same round.
//
//   dispatch row:  token u32 | ids i32[top_k] | weights f32[top_k] | pad to 16 | payload | scales | pad to 16
//   combine row:   payload
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/limits.h"

namespace efa_ep {

struct RowShape {
  uint32_t top_k = 1;
  uint32_t payload_bytes = 16;  ///< one token's activation as dispatched, a multiple of 16
  uint32_t scale_bytes = 0;     ///< its block scales, 0 if there are none
  uint32_t combine_bytes = 16;  ///< one token's expert output, a multiple of 16

  static constexpr size_t token_offset() { return 0; }
  static constexpr size_t ids_offset() { return 4; }
  constexpr size_t weights_offset() const { return 4 + size_t{4} * top_k; }
  constexpr size_t payload_offset() const { return align_up(4 + size_t{8} * top_k, kRowAlignment); }
  constexpr size_t scales_offset() const { return payload_offset() + payload_bytes; }
  constexpr size_t dispatch_bytes() const { return align_up(scales_offset() + scale_bytes, kRowAlignment); }

  constexpr bool operator==(const RowShape&) const = default;
};

}  // namespace efa_ep
