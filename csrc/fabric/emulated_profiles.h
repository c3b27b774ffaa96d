// What an emulated network is like: the numbers of an instance type, or of a network worse than any.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace efa_ep {

struct EmulatedProfile {
  std::string name;
  uint32_t nics = 1;                   ///< per rank
  uint64_t bytes_per_second = 0;       ///< payload, per NIC and direction
  std::chrono::nanoseconds latency{};  ///< one way, from NIC to NIC
  /// The most that a piece, an acknowledgement or a completion may take longer; uniform from 0.
  std::chrono::nanoseconds jitter{};
  /// Least time between two work requests that one NIC starts.
  std::chrono::nanoseconds work_request_interval{};
  uint32_t mtu = 0;                     ///< most bytes of one piece
  uint32_t interleaved_writes = 1;      ///< writes whose pieces a NIC mixes; 1: one write after the other
  uint32_t send_queue_depth = 0;        ///< per NIC
  uint32_t completion_queue_depth = 0;  ///< per NIC
  uint64_t max_write_bytes = 0;
  bool honours_fence = false;  ///< WriteRequest::fence works, as on fabrics that are not EFA
  /// When a lost piece is sent again, counted from when it should have arrived.
  std::chrono::nanoseconds retransmit_timeout{};
  uint32_t lost_pieces_per_million = 0;
  /// When a device gives up on a target that does not answer.
  std::chrono::nanoseconds unreachable_after{};
};

/// All that emulated_profile() knows: p5, p5en, p6-b200, p6-b300, hostile.
std::span<const EmulatedProfile> emulated_profiles();

/// Throws ConfigurationError that lists the names there are.
const EmulatedProfile& emulated_profile(std::string_view name);

/// Throws ConfigurationError naming the first value that no network can have.
void require_valid(const EmulatedProfile& profile);

}  // namespace efa_ep
