// What can go wrong in an emulated network, on order.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

namespace efa_ep {

enum class FaultKind : uint8_t {
  /// `writes` writes end in an error at their source and never arrive; any of their pieces may have landed.
  kFailWrites,
  /// Each piece of `writes` writes is lost `losses` times before it lands: a storm of retransmissions.
  kLosePieces,
  /// The NIC is gone for good: its writes fail, those to it stay unanswered, a post to it ends in an error.
  kLoseNic,
  /// Every post is answered with "again" for `duration`.
  kRefusePosts,
  /// The rank's process stops for `duration` or until kThaw: no post, no poll. Its memory and NICs go on.
  kFreeze,
  kThaw,
  /// The rank's process is gone. What it had posted lands in full, in part or not at all.
  kDie,
};

/// How a dead rank's NIC treats later writes.
enum class AfterDeath : uint8_t {
  kRefuses,      ///< the process died: the device answers that the queue pair is gone
  kUnreachable,  ///< the machine died: writes fail when the initiator's device gives up
  kSilent,       ///< writes to it never complete, not even in an error
};

/// Strikes at a time, at a post, or at once if neither is set. It meets the rank's newest incarnation.
struct Fault {
  FaultKind kind = FaultKind::kDie;
  uint32_t rank = 0;
  std::optional<uint32_t> rail =
      std::nullopt;  ///< one NIC; empty: all of the rank. Not for kFreeze, kThaw and kDie
  std::optional<std::chrono::nanoseconds> at = std::nullopt;  ///< virtual time
  /// The n-th write that the rank posts (on `rail`) from now on, from 1. kFailWrites and kLosePieces begin
  /// with that write, everything else happens right after it.
  std::optional<uint64_t> at_post = std::nullopt;

  uint64_t writes = 1;  ///< kFailWrites, kLosePieces: how many are struck
  uint32_t losses = 3;  ///< kLosePieces: at most 254
  /// kRefusePosts, kFreeze; empty: for ever.
  std::optional<std::chrono::nanoseconds> duration = std::nullopt;
  AfterDeath after_death = AfterDeath::kRefuses;  ///< kDie
  /// kDie: if set, all that it had posted lands in full, but only that much later.
  std::optional<std::chrono::nanoseconds> late_by = std::nullopt;
};

}  // namespace efa_ep
