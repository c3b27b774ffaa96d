// The immediate data of tile puts (proxy/tile_puts.h); bit 31 tells it from that of rounds (immediate.h).
//
//   31  30         21 20           19   12 11     0
//   | 1 | source rank | generation | group | writes |
//
// `writes` is 0 on all writes of a group but the one that was posted last, which says how many they are: the
// receiver counts to it, in whatever order they come. The generation's lowest bit turns a write of another
// use of the group into an error.
#pragma once

#include <cstdint>

#include "protocol/limits.h"

namespace efa_ep {

/// Groups that a rank may have under way to one other rank, and writes that one of them may take.
inline constexpr uint32_t kMaxTileGroups = 256;
inline constexpr uint32_t kMaxTileGroupWrites = 4095;

struct TileImmediate {
  uint32_t source = 0;      ///< rank
  uint32_t generation = 0;  ///< uses of the group before this one; only the lowest bit travels
  uint32_t group = 0;
  uint32_t writes = 0;  ///< of the group to this rank in this generation, or 0: another write says it

  static constexpr bool is_one(uint32_t bits) { return (bits >> 31) != 0; }

  constexpr uint32_t encode() const {
    return 1u << 31 | source << 21 | (generation & 1u) << 20 | group << 12 | writes;
  }
  static constexpr TileImmediate decode(uint32_t bits) {
    return {bits >> 21 & 0x3FFu, bits >> 20 & 1u, bits >> 12 & 0xFFu, bits & 0xFFFu};
  }
  constexpr bool operator==(const TileImmediate&) const = default;
};

static_assert(kMaxRanks <= 1024 && kMaxTileGroups <= 256 && kMaxTileGroupWrites <= 0xFFF);

}  // namespace efa_ep
