// The 32 bits of immediate data that travel with every write, and are its completion signal.
//
//   31  30      26 25        24       23         17 16          15            0
//   | 0 | round % 32 | operation | channel | source node | first chunk | value |
//
// Bit 31 leaves the other half of the numbers to traffic outside of rounds (tile_immediate.h).
//
// `value` is the pair's total number of rows on the first chunk and the chunk's index on every other one:
// with it the receiver knows how many chunks to count (chunking.h), and needs no order between them. The
// round's low bits are not needed by a correct run (docs/architecture.md, "self-clocking"); they turn a stale
// or foreign writer into an error.
#pragma once

#include <cstdint>

#include "protocol/limits.h"

namespace efa_ep {

/// The two transfers of a round.
enum class Operation : uint32_t { kDispatch = 0, kCombine = 1 };
inline constexpr uint32_t kOperations = 2;

struct Immediate {
  static constexpr uint32_t kRoundPeriod = 32;

  uint32_t round_tag = 0;  ///< round % kRoundPeriod
  Operation operation = Operation::kDispatch;
  uint32_t channel = 0;
  uint32_t source_node = 0;
  bool first = false;
  uint32_t value = 0;  ///< total rows if `first`, else the chunk's index (>= 1)

  constexpr uint32_t chunk() const { return first ? 0 : value; }

  constexpr uint32_t encode() const {
    return (round_tag % kRoundPeriod) << 26 | static_cast<uint32_t>(operation) << 25 | channel << 24 |
           source_node << 17 | (first ? 1u : 0u) << 16 | value;
  }
  static constexpr Immediate decode(uint32_t bits) {
    return {bits >> 26 & 0x1Fu,     static_cast<Operation>(bits >> 25 & 1u),
            bits >> 24 & 1u,        bits >> 17 & 0x7Fu,
            (bits >> 16 & 1u) != 0, bits & 0xFFFFu};
  }
  constexpr bool operator==(const Immediate&) const = default;
};

static_assert(kMaxNodes <= 128 && kMaxChannels <= 2 && kMaxTokensPerRank <= 0xFFFF);

}  // namespace efa_ep
