// What a kernel hands over to have a tile of its output put into another rank's memory.
#pragma once

#include <array>
#include <cstdint>

#include "protocol/limits.h"
#include "protocol/tile_immediate.h"

namespace efa_ep {

inline constexpr uint32_t kMaxTileBytes = 4 << 20;
/// Tiles start on this many bytes and are as many times this long; 4 KB to 4 MB is what is worth a transfer.
inline constexpr uint32_t kTileAlignment = kRowAlignment;
/// Remote offsets are below this: what is left of 16 bytes for them.
inline constexpr uint64_t kMaxTileReach = uint64_t{1} << 37;

/// "Put these bytes there; they are one of `transfers` of this group to this peer." A kernel knows
/// `transfers` from the routing, before it has computed the first tile; a group without tiles is one transfer
/// of 0 bytes. 16 bytes, so that a device submits one with a single store.
struct TilePut {
  uint32_t peer = 0;
  uint32_t group = 0;      ///< < kMaxTileGroups
  uint32_t transfers = 1;  ///< 1 to kMaxTileGroupWrites; the same in all puts of the group to this peer
  uint32_t bytes = 0;
  uint64_t local_offset = 0;   ///< from the start of this rank's registered memory
  uint64_t remote_offset = 0;  ///< from the start of the peer's

  constexpr std::array<uint64_t, 2> encode() const {
    return {remote_offset / kTileAlignment << 31 | uint64_t{peer} << 21 | uint64_t{group} << 13 |
                uint64_t{transfers} << 1,
            local_offset / kTileAlignment << 19 | bytes / kTileAlignment};
  }
  static constexpr TilePut decode(std::array<uint64_t, 2> words) {
    return {.peer = static_cast<uint32_t>(words[0] >> 21 & 0x3FF),
            .group = static_cast<uint32_t>(words[0] >> 13 & 0xFF),
            .transfers = static_cast<uint32_t>(words[0] >> 1 & 0xFFF),
            .bytes = static_cast<uint32_t>(words[1] & 0x7FFFF) * kTileAlignment,
            .local_offset = (words[1] >> 19) * kTileAlignment,
            .remote_offset = (words[0] >> 31) * kTileAlignment};
  }
  constexpr bool operator==(const TilePut&) const = default;
};

static_assert(kMaxRanks <= 1024 && kMaxTileGroups <= 256 && kMaxTileGroupWrites <= 0xFFF);
static_assert(kMaxTileBytes / kTileAlignment <= 0x7FFFF);
static_assert(kMaxTileReach / kTileAlignment == uint64_t{1} << 33);

}  // namespace efa_ep
