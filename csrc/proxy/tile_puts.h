// Tile-granular puts, as a persistent MoE kernel issues them: many producers at once, 4 KB to 4 MB each, with
// one signal word at the target per (source, group).
//
//   producers ──try_submit──▶ ring ──▶ per-destination queues ──post_write──▶ Fabric, all NICs
//                                                                               │ immediates
//   readers ◀── signal(source, group) == generations complete ◀── counting ◀────┘
//   producers ◀── sent(peer, group) == generations complete ◀──── completions ◀─┘
//
// A reader that sees the signal's generation sees all bytes of the group's transfers, on an unordered fabric:
// every write has an immediate that comes after its own bytes, and the receiver counts immediates. How that
// promise is kept is the fabric's matter, or that of the SignalPolicy around it.
//
// One thread at a time does the work, because a Fabric is used by one thread at a time. On a rank that also
// runs rounds, that is the Proxy's: it takes TilePuts along (ProxyOptions::tiles), polls the fabric for both,
// and tells the completions apart by immediate and context. Elsewhere, whoever owns the fabric calls drive().
//
// A source has a window of writes per target, freed by its own completions. Those say that bytes have landed,
// and not that the target has polled the immediate; EFA loses a completion queue that overruns, for good. So
// the target's queue is safe
//   - whatever the target does, if the groups that a source has under way to it take at most window() writes
//     together: by the rule below, the writes of a group's last use have been polled when it is used again;
//   - with more writes, only while the target polls as fast as they land: whoever does its work must not
//     pause while others put.
// No credits go back: each would be one more work request, and one more completion to bound.
//
// A group may be used again for a peer when the peer's reader has seen the signal of its last use. A kernel
// knows that without a message: its reader is what frees the tiles' place at the target. The place where the
// tiles came from is free when sent() says so.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <set>
#include <span>
#include <vector>

#include "clock.h"
#include "fabric/fabric.h"
#include "proxy/command_ring.h"
#include "proxy/posting.h"
#include "proxy/tile_put.h"

namespace efa_ep {

struct TilePutOptions {
  uint32_t rank = 0;
  uint32_t ranks = 1;
  uint32_t groups = 1;                ///< 1 to kMaxTileGroups
  uint64_t chunk_bytes = 256 * 1024;  ///< longest write; longer transfers are cut, and spread over the NICs
  uint32_t ring_commands = 4096;
  std::chrono::nanoseconds timeout = std::chrono::seconds(120);  ///< longest time a write may be refused
  const DeadlineClock* clock = &kSteadyClock;                    ///< of that time; outlives this
};

/// Totals since the start; all monotone.
struct TilePutCounters {
  uint64_t transfers = 0;    ///< taken from the ring
  uint64_t writes = 0;       ///< posted
  uint64_t bytes = 0;        ///< of those writes
  uint64_t completions = 0;  ///< own writes completed
  uint64_t immediates = 0;   ///< writes of peers that arrived here
  uint64_t signals = 0;      ///< groups of peers that became complete here
  uint64_t retries = 0;      ///< posts that the fabric answered with "again"
  uint64_t waits = 0;        ///< times a destination's window of outstanding writes was full
};

class TilePuts {
 public:
  /// Words that readers and producers watch: those of signal(source, group), by source and group, then those
  /// of sent(peer, group).
  static constexpr size_t words(uint32_t ranks, uint32_t groups) { return 2 * size_t{ranks} * groups; }

  /// `words` are as many as words() says, all zero. They and `fabric` outlive this. Throws
  /// ConfigurationError, also if the fabric's completion queues are too short for one write of every rank.
  TilePuts(Fabric& fabric, std::span<uint64_t> words, const TilePutOptions& options);

  /// Hands over a put, in any thread. Returns false if the ring is full: try again. Throws ConfigurationError
  /// for a put that cannot be right.
  bool try_submit(const TilePut& put);

  /// Generations of the group of `source` that are complete here: 0, then one more with each use. What is
  /// read after a generation was seen, in any thread, includes all its bytes.
  uint64_t signal(uint32_t source, uint32_t group) const {
    return word(index(source, group)).load(std::memory_order_acquire);
  }
  /// Generations of the group to `peer` whose bytes are no longer needed here.
  uint64_t sent(uint32_t peer, uint32_t group) const {
    return word(outgoing_.size() + index(peer, group)).load(std::memory_order_acquire);
  }

  /// Writes that every rank may leave unpolled at every other one, over all NICs, without harm: what the
  /// groups under way to a peer may take if that peer does not poll. A transfer takes one for each begun
  /// TilePutOptions::chunk_bytes, at least one.
  uint32_t window() const { return window_; }

  /// Posts what is submitted, as far as there is room. Returns whether anything moved.
  bool work();
  /// Whether a completion that the fabric reported belongs to tile puts.
  static bool owns(const Completion& completion);
  /// Takes such a completion. Throws TransportError and ProtocolError.
  void complete(const Completion& completion);

  /// Polls the fabric and does the work, on a rank whose fabric carries nothing else. Returns whether
  /// anything moved; throws as complete().
  bool drive();

  /// Whether all submitted puts are complete as far as this rank can know. Called by who does the work.
  bool idle() const { return ring_.empty() && queued_ == 0 && outstanding_ == 0; }
  /// Ranks to which taken puts are not complete yet.
  std::set<uint32_t> unfinished_peers() const;
  /// In any thread.
  TilePutCounters counters() const;

 private:
  /// A transfer that is not posted in full.
  struct Transfer {
    TilePut put;
    uint32_t writes = 1;
    uint32_t posted = 0;
    uint32_t generation = 0;
    uint32_t group_writes = 0;  // if it is the last of its group
  };
  struct Destination {
    std::deque<Transfer> queue;
    uint32_t outstanding = 0;
    uint32_t posted = 0;  // chooses NICs
    Refusal refusal;
  };
  /// A group to one peer, as far as it was submitted.
  struct Outgoing {
    uint32_t generation = 0;
    uint32_t announced = 0;
    uint32_t taken = 0;
    uint32_t writes = 0;
    uint32_t incomplete = 0;  // writes of any generation
  };
  /// A group of one source, as far as it has arrived.
  struct Incoming {
    uint32_t generation = 0;
    uint32_t seen = 0;
    uint32_t writes = 0;  // 0: not known yet
  };
  struct AtomicCounters {
    std::atomic<uint64_t> transfers{0}, writes{0}, bytes{0}, completions{0}, immediates{0}, signals{0},
        retries{0}, waits{0};
  };

  bool take_puts();
  void enqueue(const TilePut& put);
  bool post_one(uint32_t peer);
  WriteRequest next_write(const Destination& destination) const;
  void on_arrival(uint32_t bits);
  size_t index(uint32_t rank, uint32_t group) const { return size_t{rank} * options_.groups + group; }
  std::atomic_ref<uint64_t> word(size_t number) const { return std::atomic_ref<uint64_t>(words_[number]); }
  // Only who does the work writes counters; readers may be anywhere.
  static void add(std::atomic<uint64_t>& counter, uint64_t amount) {
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
  }

  Fabric& fabric_;
  const std::span<uint64_t> words_;
  const TilePutOptions options_;
  const uint32_t rails_;
  const uint32_t window_;  // most outstanding writes per destination

  Ring<TilePut> ring_;
  std::vector<Destination> destinations_;  // by rank
  std::vector<uint32_t> busy_;             // ranks with a queue, in the order of their turns
  std::vector<Outgoing> outgoing_;         // by index()
  std::vector<Incoming> incoming_;
  std::vector<Completion> completions_;
  size_t queued_ = 0;  // transfers
  size_t outstanding_ = 0;
  AtomicCounters counters_;
};

}  // namespace efa_ep
