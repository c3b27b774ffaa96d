// What the kernels know: one struct in device memory, and the scratch memory that lasts from half to half.
//
// Everything that changes with the configuration or the membership (topology, owners, peers' arenas, offsets)
// is read from here when a kernel runs, and rounds are counted here. So a captured CUDA graph stays valid
// when the host, between rounds, fills the same workspace anew: after ranks were lost, or came back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/device_ring.h"
#include "half_times.h"
#include "protocol/half.h"
#include "protocol/layout.h"
#include "protocol/scalar_type.h"

namespace efa_ep::cuda {

/// Sets of rows are kept as bits, 32 rows in a tile, with the number of members in all tiles before it: the
/// place of a member among the members, in row order, is `before` plus the members below it in its tile.
struct Tile {
  uint32_t members = 0;
  uint32_t before = 0;
};
inline constexpr uint32_t kTileRows = 32;
constexpr uint32_t tiles_of(size_t rows) { return static_cast<uint32_t>((rows + kTileRows - 1) / kTileRows); }

/// Where an expert lives.
struct ExpertHome {
  /// Of its rank: one of DeviceState::destinations(), or their number if the rank is gone. Destinations are
  /// in the order in which combine sums what comes back: nodes ascending, and in the own node's place its
  /// ranks.
  uint32_t destination = 0;
  uint32_t local = 0;  ///< the expert's index among those of its rank
};

/// What kernels count of one channel, since the start: as DeviceCounters of the CPU's device (cpu/device.h).
struct ChannelTotals {
  uint64_t rounds = 0;
  uint64_t tokens = 0;
  uint64_t dropped_slots = 0;
  uint64_t dropped_weight = 0;  ///< signed, in units of 1 / kWeightUnits: sums in any order are equal
  uint64_t received_rows = 0;
  uint64_t network_rows = 0;
  uint64_t peer_rows = 0;

  static constexpr float kWeightUnits = 1 << 24;
  /// A float32 in these units, rounded towards zero; magnitudes from 2^32 on, which no router makes, count as
  /// less.
  static constexpr int64_t weight_units(uint32_t bits) {
    const auto shift = static_cast<int32_t>(bits >> 23 & 0xFF) - 126;  // of a fraction of 24 bits
    const int64_t fraction = (bits & 0x7FFFFF) | 0x800000;
    const int64_t units =
        shift < 0 ? fraction >> (shift < -24 ? 24 : -shift) : fraction << (shift > 32 ? 32 : shift);
    return bits >> 31 == 0 ? units : -units;
  }
};

/// The longest time for which a thread of a kernel waited, and for which rank: a maximum finds it.
struct LongestWait {
  uint64_t nanoseconds = 0;
  uint32_t rank = 0;

  static constexpr uint32_t kRankBits = 16;
  static_assert(kMaxRanks <= 1u << kRankBits);
  constexpr uint64_t encode() const { return nanoseconds << kRankBits | rank; }
  static constexpr LongestWait decode(uint64_t word) {
    return {.nanoseconds = word >> kRankBits,
            .rank = static_cast<uint32_t>(word & ((uint64_t{1} << kRankBits) - 1))};
  }
};

/// Kernels of a half that wait, at most.
inline constexpr size_t kWaitingKernels = 2;

/// One half of one round on the device's clock, in nanoseconds.
struct HalfClock {
  uint64_t begun_complement = 0;  ///< of its first block's begin: the earliest has the largest. 0: not begun
  uint64_t ended = 0;             ///< the last warp of its last kernel
  uint64_t longest_wait[kWaitingKernels] = {};
};

/// HalfTimes of one channel, as kernels count them.
struct ChannelTimes {
  struct Durations {
    uint64_t total_ns = 0;
    uint64_t samples[kDurationBuckets] = {};
  };
  Durations halves[kHalves], waits[kHalves];
  uint64_t waited_for_ns[kMaxRanks] = {};
};

/// Counters of one channel that kernels change.
struct ChannelCounters {
  uint32_t round = 0;
  uint32_t tokens = 0;         ///< dispatched in this round
  uint32_t received = 0;       ///< rows received in this round
  uint32_t blocks_done = 0;    ///< of the running kernel
  uint64_t submitted[2] = {};  ///< commands so far, by Operation
  ChannelTotals totals;
  HalfClock clocks[2][kHalves];  ///< by the parity of the round: of this round, and of the one before
  ChannelTimes times;
};

/// One channel: offsets of its sections in every arena, and its scratch memory on this device.
struct ChannelState {
  uint64_t arrivals[kOperations] = {};     ///< from DeviceState::signals
  uint64_t completions[kOperations] = {};  ///< likewise
  uint64_t dispatch_flags = 0, result_flags = 0, row_lists = 0;
  uint64_t outgoing[kOperations] = {}, slots[kOperations] = {};
  uint64_t results = 0;

  ChannelCounters* counters = nullptr;
  ChannelTotals* totals = nullptr;       ///< a copy of those, for the host; pinned host memory
  ChannelTimes* times = nullptr;         ///< likewise
  Tile* sent = nullptr;                  ///< [destinations][token tiles] own tokens by destination
  uint32_t* sent_rows = nullptr;         ///< [destinations]
  Tile* forwarded = nullptr;             ///< [nodes - 1][ranks_per_node][token tiles] rows of a slot by owner
  uint32_t* slot_rows = nullptr;         ///< [nodes - 1] rows in the slots
  uint32_t* forwarded_rows = nullptr;    ///< [nodes - 1][ranks_per_node]
  uint32_t* first_row = nullptr;         ///< [world + 1] of a source's rows, in the output
  const std::byte** received = nullptr;  ///< [world * max_tokens] where each received row lies
  Tile* of_expert = nullptr;             ///< [local experts][row tiles] received rows by expert (per_expert)
  uint32_t* staged[kOperations] = {};    ///< [nodes - 1][max_chunks] rows of a chunk that are ready to go
};

struct DeviceState {
  Layout layout;
  uint32_t rank = 0, node = 0, index = 0, nodes = 1;
  uint64_t dispatch_row = 0, combine_row = 0;  ///< bytes
  uint32_t token_tiles = 0, row_tiles = 0;     ///< of max_tokens, and of world * max_tokens
  uint32_t experts = 0, local_experts = 0;
  uint32_t lost_experts = 0;  ///< without an owner
  uint64_t chunk_bytes = 0;
  uint32_t rails = 1;
  uint32_t max_chunks[kOperations] = {};
  const ExpertHome* homes = nullptr;   ///< [experts]
  std::byte* const* arenas = nullptr;  ///< [ranks_per_node], this device's addresses of them
  const std::byte* signals = nullptr;  ///< see DeviceMemory

  RingEntry* ring = nullptr;            ///< pinned host memory
  const uint64_t* ring_tail = nullptr;  ///< pinned host memory
  uint32_t ring_capacity = 0;
  uint64_t* ring_head = nullptr;        ///< positions taken; device memory
  uint64_t* ring_known_tail = nullptr;  ///< the newest tail that a kernel has read; device memory

  uint64_t timeout_ns = 0;
  uint64_t* error = nullptr;       ///< DeviceError; pinned host memory
  uint32_t* failed = nullptr;      ///< not 0 after the first fault; device memory
  const uint32_t* stop = nullptr;  ///< not 0: waits end; pinned host memory

  ChannelState channels[kMaxChannels];

  constexpr uint32_t ranks_per_node() const { return layout.topology.ranks_per_node; }
  constexpr uint32_t world() const { return layout.topology.world; }
  constexpr uint32_t capacity() const { return world() * layout.max_tokens; }
  /// Nodes but the own one, and the ranks of the own one.
  constexpr uint32_t destinations() const { return nodes - 1 + ranks_per_node(); }
  constexpr bool is_own_node(uint32_t destination) const { return destination - node < ranks_per_node(); }
  /// Node of a destination on another node.
  constexpr uint32_t node_of(uint32_t destination) const {
    return destination < node ? destination : destination - ranks_per_node() + 1;
  }
  constexpr uint32_t destination_of(uint32_t other_node) const {
    return other_node < node ? other_node : other_node - 1 + ranks_per_node();
  }
};

/// What a device is built from; equal on all ranks but for `rank`.
struct DeviceConfig {
  Layout layout;
  uint32_t rank = 0;
  std::vector<uint32_t> expert_owner;  ///< owner rank of every expert, or kNoOwner
  bool per_expert = false;
  uint64_t chunk_bytes = 256 * 1024;  ///< Proxy::chunk_bytes()
  uint32_t rails = 1;                 ///< Proxy::rails()
  uint64_t timeout_ns = 120'000'000'000;
};

/// Memory that the host provides. All addresses are the device's.
struct DeviceMemory {
  std::vector<std::byte*> arenas;  ///< of the node's ranks, in order; [index] is the own one
  /// What Layout::arrival() and Layout::completion() are offsets from: the own arena, if the proxy can write
  /// there, or pinned host memory.
  const std::byte* signals = nullptr;
  std::byte* workspace = nullptr;  ///< workspace_bytes() of zeros in device memory, 256-byte aligned

  RingEntry* ring = nullptr;            ///< [ring_capacity] zeros in pinned host memory
  const uint64_t* ring_tail = nullptr;  ///< 0, in pinned host memory; DeviceRingReader's
  uint32_t ring_capacity = 0;           ///< a power of two
  uint64_t* error = nullptr;            ///< [2] zeros in pinned host memory: DeviceError
  const uint32_t* stop = nullptr;       ///< 0, in pinned host memory; the host sets it to end all waits
  ChannelTotals* totals = nullptr;      ///< [channels] zeros in pinned host memory
  ChannelTimes* times = nullptr;        ///< likewise
};

/// Bytes of DeviceMemory::workspace.
size_t workspace_bytes(const DeviceConfig& config);

/// What the host copies to the start of the workspace before the first launch: the DeviceState, which the
/// kernels find there, and its tables. Throws ConfigurationError for owners outside the world.
std::vector<std::byte> workspace_image(const DeviceConfig& config, const DeviceMemory& memory);

}  // namespace efa_ep::cuda
