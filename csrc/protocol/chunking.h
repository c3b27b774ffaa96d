// How the rows of one pair are cut into chunks. Sender and receiver compute the same cut from the same
// numbers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace efa_ep {

struct Chunking {
  uint32_t rows = 0;    ///< rows of the pair
  uint32_t chunks = 1;  ///< at least 1: a pair without rows still signals

  /// Cuts `rows` rows of `row_bytes` bytes into as many chunks as bytes / `chunk_bytes` is nearest to, and
  /// into at least `rails` chunks if there are that many rows, so that every NIC gets a share. The rows of
  /// two chunks differ by at most one, so the longest is less than a row above one and a half of
  /// `chunk_bytes`.
  ///
  /// To the nearest and not up: numbers of rows vary from pair to pair, and a write for what is left over
  /// would cost every second pair a write of a fraction of the size that writes are worth.
  static constexpr Chunking of(uint32_t rows, uint64_t row_bytes, uint64_t chunk_bytes, uint32_t rails) {
    if (rows == 0) return {};
    const uint64_t nearest = (rows * row_bytes + chunk_bytes / 2) / chunk_bytes;
    return {rows, static_cast<uint32_t>(std::min<uint64_t>(rows, std::max<uint64_t>(nearest, rails)))};
  }

  constexpr uint32_t first_row(uint32_t chunk) const {
    return static_cast<uint32_t>(uint64_t{rows} * chunk / chunks);
  }
  constexpr uint32_t rows_in(uint32_t chunk) const { return first_row(chunk + 1) - first_row(chunk); }
  /// The chunk that holds a row.
  constexpr uint32_t chunk_of(uint32_t row) const {
    return static_cast<uint32_t>(((uint64_t{row} + 1) * chunks - 1) / rows);
  }
};

/// The NIC pair of a chunk. It depends on sender, destination and chunk: if all senders chose alike, one NIC
/// of the receiver would get everything at once. The other nodes are numbered 0 to nodes - 2 from the sender
/// on, so that the chunks with one index go round the NICs of every sender, and of every receiver, exactly
/// evenly.
constexpr uint32_t rail_of(uint32_t sender_node, uint32_t destination_node, uint32_t nodes, uint32_t chunk,
                           uint32_t rails) {
  return ((destination_node - sender_node + nodes) % nodes - 1 + chunk) % rails;
}

}  // namespace efa_ep
