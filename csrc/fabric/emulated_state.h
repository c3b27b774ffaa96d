// The hosts, NICs and writes of an emulated network, between events.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "fabric/emulated_events.h"
#include "fabric/emulated_faults.h"
#include "fabric/fabric.h"

namespace efa_ep {

/// Completion statuses of EFA devices that the emulation produces (rdma-core, providers/efa/efa_io_defs.h).
enum class EfaStatus : uint8_t {
  kOk = 0,
  kFlushed = 1,
  kRemoteBadAddress = 7,
  kRemoteAbort = 8,
  kRemoteBadDestQpn = 9,
  kUnresponsiveRemote = 13,
  kRemoteUnknownPeer = 14,
  kUnreachableRemote = 15,
};

struct EmulatedPiece {
  uint32_t index : 24;
  uint32_t attempt : 8;  ///< how often it was lost
};

/// From its post until neither an event nor a queue knows it.
struct EmulatedWrite {
  enum class Phase : uint8_t {
    kMoving,
    kUnanswered,  ///< the target is silent; an error may follow
    kLanded,      ///< all bytes are there; the target and the source are about to be told
    kFailed,
    kOver,
  };

  uint64_t number = 0;  ///< counts the network's writes from 1
  uint32_t source = 0;  ///< endpoints
  uint32_t target = 0;
  uint64_t target_key = 0;
  WriteRequest request;
  Phase phase = Phase::kMoving;
  uint32_t pieces = 0;
  uint32_t landed = 0;
  std::vector<EmulatedPiece> unsent;
  uint32_t losses = 0;                  ///< how often each piece is lost by order
  std::optional<uint32_t> fails_after;  ///< by order: after so many landed pieces
  Picoseconds held_until{0};            ///< no piece lands before
  uint32_t events = 0;                  ///< in the queue
  uint64_t checksum = 0;                ///< of the source, if sources are checked
  std::vector<std::byte> snapshot;      ///< the source's bytes, once the source is dead
};

/// Order on the way from a NIC to one target, where fences are honoured.
struct EmulatedPath {
  std::set<uint64_t> unacknowledged;  ///< writes, by number
  std::deque<uint64_t> fences;        ///< fenced writes that may not have started yet
};

/// What the work of one NIC takes in turn, for whichever endpoints of the machine.
struct EmulatedLink {
  Picoseconds next_work_request{0};
  Picoseconds send_free{0};
  Picoseconds receive_free{0};
};

/// An endpoint's part of a NIC.
struct EmulatedNic {
  std::shared_ptr<EmulatedLink> link = std::make_shared<EmulatedLink>();
  // Outbound.
  std::unordered_map<uint32_t, EmulatedPath> paths;  ///< by target; only if the profile honours fences
  std::deque<uint32_t> queue;                        ///< writes it has not begun
  std::vector<uint32_t> sending;                     ///< writes it is sending
  bool scheduled = false;                            ///< its next turn is in the event queue
  uint32_t in_flight = 0;                            ///< writes whose completion was not polled
  // Inbound.
  std::deque<Completion> completions;
  // Faults.
  bool lost = false;
  bool overrun = false;
  std::optional<Picoseconds> refuses_until;
};

/// One incarnation of a rank.
struct EmulatedEndpoint {
  struct Peer {
    uint32_t endpoint = 0;
    uint64_t key = 0;
    uint64_t memory_bytes = 0;
  };
  /// A fault that waits for a post.
  struct Armed {
    Fault fault;
    uint64_t posts_left = 0;
  };
  /// A fault that strikes the next writes.
  struct Striking {
    Fault fault;
    uint64_t writes_left = 0;
  };

  uint32_t id = 0;
  uint32_t rank = 0;
  bool alive = true;
  AfterDeath after_death = AfterDeath::kRefuses;
  std::optional<Picoseconds> frozen_until;
  bool woken = false;

  std::span<std::byte> memory;
  uint64_t key = 0;                          ///< of the registration; 0: none
  std::unordered_map<uint32_t, Peer> peers;  ///< by rank
  std::unordered_set<uint32_t> initiators;   ///< endpoints that may write here
  std::vector<EmulatedNic> nics;
  std::vector<Armed> armed;
  std::vector<Striking> striking;
  size_t first_polled = 0;
};

}  // namespace efa_ep
