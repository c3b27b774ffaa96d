// What a rank tells its peers so that they can write into its memory: the bytes of Fabric::address().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace efa_ep {

/// Memory is registered in pieces, because one registration above about 2 GiB fails on EFA and IOMMUs map
/// chunks of 1 GiB best. Neighbours overlap by the longest write, so that every write lies inside one piece
/// on either side.
inline constexpr uint64_t kMaxPieceBytes = uint64_t{1} << 30;
inline constexpr uint64_t kMaxWriteBytes = uint64_t{64} << 20;
inline constexpr uint64_t kPieceStride = kMaxPieceBytes - kMaxWriteBytes;

/// Pieces of `bytes` bytes of memory; piece i starts at i * kPieceStride.
constexpr uint64_t piece_count(uint64_t bytes) { return (bytes + kPieceStride - 1) / kPieceStride; }
/// The piece that holds a write of at most kMaxWriteBytes bytes at `offset`.
constexpr uint64_t piece_of(uint64_t offset) { return offset / kPieceStride; }

/// One NIC of a rank.
struct RailAddress {
  std::vector<std::byte> endpoint_name;  ///< what the peer's provider inserts into its address vector
  uint64_t base = 0;           ///< virtual address of the memory; 0 if the provider addresses by offset
  std::vector<uint64_t> keys;  ///< one per piece of memory
};

/// A rank's address. Two ranks can talk if everything before `memory_bytes` is equal.
struct FabricAddress {
  uint32_t library_major = 0;
  uint32_t library_minor = 0;
  std::string provider;
  std::string fabric;  ///< only for providers with several incompatible fabrics ("efa-direct"), else empty
  uint32_t address_format = 0;
  uint64_t memory_bytes = 0;
  std::vector<RailAddress> rails;

  std::vector<std::byte> encode() const;

  /// Throws ProtocolError if `bytes` is not exactly one encoded address; never reads outside of `bytes`.
  static FabricAddress decode(std::span<const std::byte> bytes);

  /// Throws ProtocolError naming what differs if a rank with this address cannot talk to `peer`.
  void require_compatible(uint32_t peer_rank, const FabricAddress& peer) const;
};

}  // namespace efa_ep
