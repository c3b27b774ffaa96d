// Measures the link between two ranks with real writes in both directions: `vllm-efa-ep doctor` asks it
// whether two nodes can write to each other at all (security group, subnet, address), how fast, and how much.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

#include "fabric/fabric.h"

namespace efa_ep {

/// What both ends do. All members but `peer` and `starts` must be equal on both.
struct LinkPlan {
  uint32_t peer = 0;
  bool starts = false;         ///< true on exactly one of the two ends: it sends the first ping
  uint32_t session = 0;        ///< < 2^31; differs from those of all earlier measurements on either fabric
  uint32_t round_trips = 0;    ///< pings of 8 bytes on each rail, after a few to warm up
  uint32_t stream_writes = 0;  ///< writes per direction, over all rails, in both directions at once
  uint32_t write_bytes = 0;    ///< of each of them, at least 8
  std::chrono::nanoseconds timeout{};
};

struct LinkTimes {
  double latency_s = 0;         ///< half of a ping's median round trip; 0 on the end that does not start
  double bytes_per_second = 0;  ///< per direction, while the other direction is as busy
};

/// Bytes of registered memory that a measurement needs on each end.
size_t link_memory_bytes(const Fabric& fabric, uint32_t write_bytes);

/// Both ends call it at about the same time, after they connect()ed each other. `memory` is what the fabric
/// has registered, from its start. One measurement at a time; after a failed one the next one may follow.
/// Throws TransportError if a write fails, RankTimeoutError if the other end is silent until the deadline,
/// ProtocolError if bytes arrive wrong, ConfigurationError if the plan cannot be carried out.
LinkTimes measure_link(Fabric& fabric, std::span<std::byte> memory, const LinkPlan& plan);

}  // namespace efa_ep
