// Who is who: ranks, nodes, rails.
#pragma once

#include <cstdint>

namespace efa_ep {

/// `world` ranks in nodes of `ranks_per_node` consecutive ranks. Ranks of one node can map each other's
/// memory; the ranks with the same index inside their nodes form a rail and talk over the network.
struct Topology {
  uint32_t world = 1;
  uint32_t ranks_per_node = 1;

  constexpr uint32_t nodes() const { return world / ranks_per_node; }
  constexpr uint32_t node_of(uint32_t rank) const { return rank / ranks_per_node; }
  constexpr uint32_t index_of(uint32_t rank) const { return rank % ranks_per_node; }
  constexpr uint32_t rank_at(uint32_t node, uint32_t index) const { return node * ranks_per_node + index; }
  /// The rank with the index of `rank` on another node.
  constexpr uint32_t rail_peer(uint32_t rank, uint32_t node) const { return rank_at(node, index_of(rank)); }

  /// Position of node `other` in a table of all nodes except `self` (slots have no entry for their own node).
  static constexpr uint32_t slot_of(uint32_t self, uint32_t other) {
    return other < self ? other : other - 1;
  }
};

}  // namespace efa_ep
