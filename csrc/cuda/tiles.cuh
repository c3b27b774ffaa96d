// Sets of rows as bits (device_state.h: Tile), made and counted by warps.
#pragma once

#include "cuda/kernel.cuh"

namespace efa_ep::cuda {

/// Sets that a warp marks at a time, in shared memory of its own.
inline constexpr uint32_t kScratchSets = 64;
struct TileScratch {
  uint32_t members[kScratchSets];
};

/// Puts each of 32 rows, the tile's, into the sets that `set_of(row, slot)` names for its slots; a number
/// beyond the last set names none. All lanes of a warp call it together.
template <class SetOf>
DP_DEVICE void mark_tile(TileScratch& scratch, Tile* tiles, uint32_t tiles_per_set, uint32_t tile,
                         uint32_t sets, uint32_t rows, uint32_t slots, SetOf set_of) {
  const uint32_t row = tile * kTileRows + lane_id();
  for (uint32_t first = 0; first < sets; first += kScratchSets) {
    for (uint32_t i = lane_id(); i < kScratchSets; i += 32) scratch.members[i] = 0;
    __syncwarp();
    for (uint32_t slot = 0; row < rows && slot < slots; ++slot) {
      const uint32_t set = set_of(row, slot) - first;
      if (set < kScratchSets) atomicOr(&scratch.members[set], 1u << lane_id());
    }
    __syncwarp();
    for (uint32_t i = lane_id(); i < kScratchSets && first + i < sets; i += 32) {
      tiles[size_t{first + i} * tiles_per_set + tile].members = scratch.members[i];
    }
    __syncwarp();
  }
}

DP_DEVICE uint32_t inclusive_sum(uint32_t value) {
#pragma unroll
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, value, distance);
    if (lane_id() >= distance) value += below;
  }
  return value;
}

/// Numbers the members of one set. All lanes of a warp call it together; returns how many there are.
DP_DEVICE uint32_t count_set(Tile* set, uint32_t tiles) {
  uint32_t total = 0;
  for (uint32_t first = 0; first < tiles; first += 32) {
    const uint32_t tile = first + lane_id();
    const uint32_t count = tile < tiles ? __popc(set[tile].members) : 0;
    const uint32_t sum = inclusive_sum(count);
    if (tile < tiles) set[tile].before = total + sum - count;
    total += __shfl_sync(kFullWarp, sum, 31);
  }
  return total;
}

DP_DEVICE bool contains(Tile tile, uint32_t row) { return (tile.members >> row % kTileRows & 1) != 0; }
/// Place of a member among the members of its set.
DP_DEVICE uint32_t place_of(Tile tile, uint32_t row) {
  return tile.before + __popc(tile.members & ((1u << row % kTileRows) - 1));
}

}  // namespace efa_ep::cuda
