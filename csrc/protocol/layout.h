// Where everything lies in a rank's arena. Every rank computes the same layout, so an offset that one rank
// knows is an offset at all of them, and no table of addresses is exchanged.
//
// Inside a node rows do not travel: each lies in the arena of the rank that made or received it, and the
// ranks of the node read it there. What travels between them is flags and lists of row numbers.
//
// First the signals: what this rank's proxy writes, of all channels, so that they can lie in other memory
// than the rest (a device whose memory the host cannot write). Per channel, with N nodes of L ranks:
//   arrivals          u64[2 operations][N]    RoundWord per source node
//   completions       u64[2 operations]       completed writes so far
// Then per channel, with B = N (L - 1) + 1 blocks (one per rank of every other rail, and one for the rank
// itself):
//   dispatch_flags    u64[B]                  RoundWord per block: a local peer has listed rows for us
//   result_flags      ResultFlag[B]           per block: a local peer has results for our rail
//   row_lists         u32[N][L][max_tokens]   per source of this rail (this rank itself in the own node's
//                                             place) and local owner: which of the source's rows are for it
//   dispatch_staging  row[N][max_tokens]      rows to send, per destination node; the last block takes rows
//                                             that go to the own node alone
//   dispatch_slots    row[N-1][max_tokens]    rows received, per source node (written by the network)
//   results           crow[W][max_tokens]     this rank's sums per received row, in the order of its output
//   combine_staging   crow[N-1][max_tokens]   node sums to send back, per source node (none if L = 1: the
//                                             results are the sums)
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
  kDispatchFlags,
  kResultFlags,
  kRowLists,
  kDispatchStaging,
  kDispatchSlots,
  kResults,
  kCombineStaging,
  kCombineSlots,
};
inline constexpr uint32_t kSections = 10;
/// The first sections, which the proxy writes.
inline constexpr uint32_t kSignalSections = 2;
inline constexpr std::array<const char*, kSections> kSectionNames = {
    "arrivals",         "completions",    "dispatch_flags", "result_flags",    "row_lists",
    "dispatch_staging", "dispatch_slots", "results",        "combine_staging", "combine_slots"};

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

  /// Most rows a rank can receive in a round.
  constexpr size_t result_rows() const { return size_t{topology.world} * max_tokens; }

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
      case Section::kDispatchFlags:
      case Section::kResultFlags:
        return blocks() * kWordStride;
      case Section::kRowLists:
        return size_t{topology.world} * max_tokens * sizeof(uint32_t);
      case Section::kDispatchStaging:
        return nodes * max_tokens * dispatch_row();
      case Section::kDispatchSlots:
        return remote_rows * dispatch_row();
      case Section::kResults:
        return result_rows() * combine_row();
      case Section::kCombineStaging:
        return topology.ranks_per_node > 1 ? remote_rows * combine_row() : 0;
      case Section::kCombineSlots:
        return remote_rows * combine_row();
    }
    return 0;
  }
  constexpr size_t padded_bytes(Section section) const {
    return align_up(section_bytes(section), kSectionAlignment);
  }
  /// Of the sections from number `first` to before number `end`, of one channel.
  constexpr size_t padded_bytes(uint32_t first, uint32_t end) const {
    size_t sum = 0;
    for (uint32_t s = first; s < end; ++s) sum += padded_bytes(static_cast<Section>(s));
    return sum;
  }
  /// Bytes of the signals of all channels, which start the arena.
  constexpr size_t signal_bytes() const { return channels * padded_bytes(0, kSignalSections); }
  /// Bytes of the whole arena (before the operating system's rounding to its page size).
  constexpr size_t total_bytes() const { return channels * padded_bytes(0, kSections); }

  constexpr size_t section_offset(uint32_t channel, Section section) const {
    const auto number = static_cast<uint32_t>(section);
    if (number < kSignalSections) return channel * padded_bytes(0, kSignalSections) + padded_bytes(0, number);
    return signal_bytes() + channel * padded_bytes(kSignalSections, kSections) +
           padded_bytes(kSignalSections, number);
  }

  constexpr size_t arrival(uint32_t channel, Operation operation, uint32_t source_node) const {
    return section_offset(channel, Section::kArrivals) +
           (static_cast<size_t>(operation) * topology.nodes() + source_node) * kWordStride;
  }
  constexpr size_t completion(uint32_t channel, Operation operation) const {
    return section_offset(channel, Section::kCompletions) + static_cast<size_t>(operation) * kWordStride;
  }
  constexpr size_t dispatch_flag(uint32_t channel, size_t block) const {
    return section_offset(channel, Section::kDispatchFlags) + block * kWordStride;
  }
  /// A RoundWord, followed by the u64 index of the first of these rows among the owner's results.
  constexpr size_t result_flag(uint32_t channel, size_t block) const {
    return section_offset(channel, Section::kResultFlags) + block * kWordStride;
  }
  /// In the arena of the rank that receives from `source_node` (or is the source itself): rows for `owner`,
  /// an index inside the node.
  constexpr size_t row_list(uint32_t channel, uint32_t source_node, uint32_t owner) const {
    return section_offset(channel, Section::kRowLists) +
           (size_t{source_node} * topology.ranks_per_node + owner) * max_tokens * sizeof(uint32_t);
  }

  /// Row numbers of an operation's outgoing rows start here.
  constexpr size_t outgoing(uint32_t channel, Operation operation) const {
    if (operation == Operation::kDispatch) return section_offset(channel, Section::kDispatchStaging);
    return section_offset(channel,
                          topology.ranks_per_node > 1 ? Section::kCombineStaging : Section::kResults);
  }
  /// Number of the first row of a rank on node `self` that waits in a staging section to be sent to `other`.
  constexpr uint32_t staged_row(uint32_t self, uint32_t other) const {
    return Topology::slot_of(self, other) * max_tokens;
  }
  /// Number of the first staged row that goes to the own node alone.
  constexpr uint32_t own_node_row() const { return (topology.nodes() - 1) * max_tokens; }

  /// Where the payload of the first of those rows lies. Activations that are produced there, row by row
  /// dispatch_row() bytes apart, need no copy for the own node.
  constexpr size_t activations(uint32_t channel) const {
    return outgoing(channel, Operation::kDispatch) + own_node_row() * dispatch_row() + row.payload_offset();
  }

  /// The slot of rows from `other` in the arena of a rank on node `self`.
  constexpr size_t slot(uint32_t channel, Operation operation, uint32_t self, uint32_t other) const {
    const bool dispatch = operation == Operation::kDispatch;
    return section_offset(channel, dispatch ? Section::kDispatchSlots : Section::kCombineSlots) +
           size_t{Topology::slot_of(self, other)} * max_tokens * row_bytes(operation);
  }
  constexpr size_t results(uint32_t channel) const { return section_offset(channel, Section::kResults); }
};

}  // namespace efa_ep
