// Where everything lies in a rank's arena. Every rank computes the same layout, so an offset that one rank
// knows is an offset at all of them, and no table of addresses is exchanged.
//
// Per channel, with N nodes of L ranks and B = N (L - 1) + 1 blocks (one per rank of every other rail, and
// one for the rank itself; what comes along the own rail lies in slots already):
//   arrivals          u64[2 operations][N]    RoundWord per source node, written by this rank's proxy
//   completions       u64[2 operations]       completed writes so far, written by this rank's proxy
//   region_flags      u64[B]                  RoundWord per block, written by local peers
//   partial_flags     u64[B]                  RoundWord per block, written by local peers
//   dispatch_staging  row[N-1][max_tokens]    rows to send, per destination node
//   dispatch_slots    row[N-1][max_tokens]    rows received, per source node (written by the network)
//   regions           row[B][max_tokens]      rows for this rank's experts, per source rank (local peers)
//   partials          crow[B][max_tokens]     owners' partial sums for sources of this rail (local peers)
//   combine_staging   crow[N-1][max_tokens]   own partials, then node sums to send back, per source node
//   combine_slots     crow[N-1][max_tokens]   node sums received, per node (written by the network)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "protocol/immediate.h"
#include "protocol/limits.h"
#include "protocol/row.h"
#include "protocol/topology.h"

namespace efa_ep {

enum class Section : uint32_t {
  kArrivals,
  kCompletions,
  kRegionFlags,
  kPartialFlags,
  kDispatchStaging,
  kDispatchSlots,
  kRegions,
  kPartials,
  kCombineStaging,
  kCombineSlots,
};
inline constexpr uint32_t kSections = 10;
inline constexpr std::array<const char*, kSections> kSectionNames = {
    "arrivals",       "completions", "region_flags", "partial_flags",   "dispatch_staging",
    "dispatch_slots", "regions",     "partials",     "combine_staging", "combine_slots"};

struct Layout {
  Topology topology;
  RowShape row;
  uint32_t max_tokens = 1;  ///< most tokens a rank may dispatch in one round
  uint32_t channels = 1;

  constexpr size_t dispatch_row() const { return row.dispatch_bytes(); }
  constexpr size_t combine_row() const { return row.combine_bytes; }
  constexpr size_t row_bytes(Operation operation) const {
    return operation == Operation::kDispatch ? dispatch_row() : combine_row();
  }

  constexpr size_t blocks() const { return size_t{topology.nodes()} * (topology.ranks_per_node - 1) + 1; }
  /// Block of rank (node, index) in the arena of a rank with index own_index. Defined for other rails and for
  /// the rank itself.
  constexpr size_t block(uint32_t own_index, uint32_t node, uint32_t index) const {
    if (index == own_index) return 0;
    return 1 + size_t{node} * (topology.ranks_per_node - 1) + Topology::slot_of(own_index, index);
  }

  /// Bytes of a section of one channel before its padding to kSectionAlignment.
  constexpr size_t section_bytes(Section section) const {
    const size_t nodes = topology.nodes();
    const size_t remote_rows = (nodes - 1) * max_tokens;
    switch (section) {
      case Section::kArrivals:
        return kOperations * nodes * kWordStride;
      case Section::kCompletions:
        return kOperations * kWordStride;
      case Section::kRegionFlags:
        return blocks() * kWordStride;
      case Section::kPartialFlags:
        return blocks() * kWordStride;
      case Section::kDispatchStaging:
        return remote_rows * dispatch_row();
      case Section::kDispatchSlots:
        return remote_rows * dispatch_row();
      case Section::kRegions:
        return blocks() * max_tokens * dispatch_row();
      case Section::kPartials:
        return blocks() * max_tokens * combine_row();
      case Section::kCombineStaging:
        return remote_rows * combine_row();
      case Section::kCombineSlots:
        return remote_rows * combine_row();
    }
    return 0;
  }
  constexpr size_t padded_bytes(Section section) const {
    return align_up(section_bytes(section), kSectionAlignment);
  }
  constexpr size_t channel_bytes() const {
    size_t sum = 0;
    for (uint32_t s = 0; s < kSections; ++s) sum += padded_bytes(static_cast<Section>(s));
    return sum;
  }
  /// Bytes of the whole arena (before the operating system's rounding to its page size).
  constexpr size_t total_bytes() const { return channels * channel_bytes(); }

  constexpr size_t section_offset(uint32_t channel, Section section) const {
    size_t offset = channel * channel_bytes();
    for (uint32_t s = 0; s < static_cast<uint32_t>(section); ++s)
      offset += padded_bytes(static_cast<Section>(s));
    return offset;
  }

  constexpr size_t arrival(uint32_t channel, Operation operation, uint32_t source_node) const {
    return section_offset(channel, Section::kArrivals) +
           (static_cast<size_t>(operation) * topology.nodes() + source_node) * kWordStride;
  }
  constexpr size_t completion(uint32_t channel, Operation operation) const {
    return section_offset(channel, Section::kCompletions) + static_cast<size_t>(operation) * kWordStride;
  }
  constexpr size_t region_flag(uint32_t channel, size_t block) const {
    return section_offset(channel, Section::kRegionFlags) + block * kWordStride;
  }
  constexpr size_t partial_flag(uint32_t channel, size_t block) const {
    return section_offset(channel, Section::kPartialFlags) + block * kWordStride;
  }
  /// Staging of rows for `other`, and the slot of rows from `other`, in the arena of a rank on node `self`.
  constexpr size_t staging(uint32_t channel, Operation operation, uint32_t self, uint32_t other) const {
    const bool dispatch = operation == Operation::kDispatch;
    return section_offset(channel, dispatch ? Section::kDispatchStaging : Section::kCombineStaging) +
           size_t{Topology::slot_of(self, other)} * max_tokens * row_bytes(operation);
  }
  constexpr size_t slot(uint32_t channel, Operation operation, uint32_t self, uint32_t other) const {
    const bool dispatch = operation == Operation::kDispatch;
    return section_offset(channel, dispatch ? Section::kDispatchSlots : Section::kCombineSlots) +
           size_t{Topology::slot_of(self, other)} * max_tokens * row_bytes(operation);
  }
  constexpr size_t region(uint32_t channel, size_t block) const {
    return section_offset(channel, Section::kRegions) + block * max_tokens * dispatch_row();
  }
  constexpr size_t partial(uint32_t channel, size_t block) const {
    return section_offset(channel, Section::kPartials) + block * max_tokens * combine_row();
  }
};

}  // namespace efa_ep
