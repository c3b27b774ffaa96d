// A network inside one process that is worse than EFA on purpose, and the same again for the same seed.
//
//  - Time is virtual and stands still until the driver calls an advance function: one thread runs every rank
//    until none progresses, then lets time go on. Nothing here knows the machine's clock.
//  - A NIC starts at most one work request per interval, mixes the pieces of a few writes at random and sends
//    them one after the other over its link. A piece arrives after the latency and a random jitter, queues
//    for the receiving NIC's link (which is what incast means), and is copied into the target's memory in
//    that moment: whoever reads earlier sees torn data. The source is read in that moment too, so memory that
//    is reused before its completion shows.
//  - The immediate is reported after the last piece, the completion of the source after an acknowledgement,
//    in no order with each other or with other writes.
//  - Queues are bounded. A full send queue answers "again". A full completion queue is overrun: the NIC is
//    lost, as on EFA, and poll() throws TransportError.
//  - The target's NIC checks every piece: a registration's key that is not current, and an initiator that it
//    has not connect()ed, end the write in an error at its source, and nothing lands.
//
// One thread, and it outlives its fabrics.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <unordered_map>
#include <vector>

#include "fabric/emulated_events.h"
#include "fabric/emulated_faults.h"
#include "fabric/emulated_profiles.h"
#include "fabric/emulated_state.h"
#include "fabric/emulated_trace.h"
#include "fabric/fabric.h"

namespace efa_ep {

struct EmulatedNetworkOptions {
  EmulatedProfile profile = {};
  uint64_t seed = 1;
  size_t logged_events = 0;    ///< of the trace; 0: only its hash
  bool check_sources = false;  ///< count writes whose source changed before their completion; reads it twice
};

/// What all incarnations of one rank did, since the start.
struct EmulatedCounters {
  uint64_t posted = 0;
  uint64_t bytes = 0;
  uint64_t refused = 0;
  uint64_t completed = 0;
  uint64_t failed = 0;
  uint64_t arrived = 0;      ///< writes of peers
  uint64_t lost_pieces = 0;  ///< of its own writes
  uint64_t changed_sources = 0;
  uint32_t most_in_flight = 0;  ///< on one NIC
  uint32_t most_unpolled = 0;   ///< completions, on one NIC
};

class EmulatedNetwork {
 public:
  static constexpr auto kForEver = std::chrono::nanoseconds::max();

  /// Throws ConfigurationError for a profile that makes no sense.
  explicit EmulatedNetwork(EmulatedNetworkOptions options);
  EmulatedNetwork(const EmulatedNetwork&) = delete;
  EmulatedNetwork& operator=(const EmulatedNetwork&) = delete;

  const EmulatedProfile& profile() const { return options_.profile; }
  /// Virtual time, also for the deadlines of proxies.
  const DeadlineClock& clock() const { return clock_; }
  std::chrono::nanoseconds now() const { return clock_.nanoseconds(); }

  /// When the next event will happen; empty if there is none.
  std::optional<std::chrono::nanoseconds> next_event() const;
  /// Goes to the next event and lets happen all that happens in that moment. False if there is no event.
  bool advance();
  /// Goes to `time` (not back), through all events on the way.
  void advance_to(std::chrono::nanoseconds time);
  /// Goes from event to event, none of them after `limit`, until some rank has something new to see. False if
  /// nobody has by then.
  bool advance_until_woken(std::chrono::nanoseconds limit = kForEver);
  /// Ranks with a completion to poll, or a freeze or refusal that has ended, since the last call; in the
  /// order in which that happened.
  std::vector<uint32_t> take_woken();

  /// Throws ConfigurationError for a fault that names no such rank or NIC.
  void inject(const Fault& fault);
  bool alive(uint32_t rank) const { return newest(rank).alive; }
  bool frozen(uint32_t rank) const { return is_frozen(newest(rank)); }

  EmulatedCounters counters(uint32_t rank) const;
  /// Of all events so far. Equal for equal seeds and equal calls.
  uint64_t trace_hash() const { return trace_.hash(); }
  const Trace& trace() const { return trace_; }

 private:
  friend class EmulatedFabric;

  struct Event {
    enum class Kind : uint8_t {
      kSend,         // subject: NIC
      kArrive,       // subject: write
      kLand,         // subject: write
      kResend,       // subject: write
      kNotify,       // subject: write
      kAcknowledge,  // subject: write
      kFail,         // subject: write
      kFault,        // subject: scheduled fault
      kWake,         // subject: endpoint
    };
    Kind kind;
    EfaStatus status;  // kFail
    uint32_t subject;
    EmulatedPiece piece;
  };
  using Write = EmulatedWrite;
  using Phase = EmulatedWrite::Phase;
  using Nic = EmulatedNic;
  using Endpoint = EmulatedEndpoint;

  // What EmulatedFabric calls (emulated_network.cpp).
  uint32_t open(uint32_t rank, std::optional<uint32_t> nics_of);
  void close(uint32_t endpoint);
  void register_memory(uint32_t endpoint, std::span<std::byte> memory);
  uint64_t id() const { return id_; }
  bool has_endpoint(uint32_t id) const { return id < endpoints_.size(); }
  const Endpoint& endpoint(uint32_t id) const { return *endpoints_[id]; }
  void connect(uint32_t endpoint, uint32_t peer, const Endpoint::Peer& address);
  PostResult post(uint32_t endpoint, const WriteRequest& request);
  size_t poll(uint32_t endpoint, std::span<Completion> completions);

  // Events and their order (emulated_network.cpp).
  void process(const Event& event);
  void schedule(Picoseconds time, const Event& event) { events_.push(time, event); }
  void schedule_write(Picoseconds time, Event::Kind kind, uint32_t write, EmulatedPiece piece = {},
                      EfaStatus status = EfaStatus::kOk);
  void process_write(const Event& event);
  const Endpoint::Peer& check_request(const Endpoint& source, const WriteRequest& request) const;
  uint32_t create_write(Endpoint& source, const Endpoint::Peer& target, const WriteRequest& request);
  void release_if_over(uint32_t write);
  void push_completion(Endpoint& endpoint, uint32_t rail, Completion completion);
  void wake(Endpoint& endpoint);
  Endpoint& newest(uint32_t rank) const;
  bool is_frozen(const Endpoint& endpoint) const {
    return endpoint.frozen_until && *endpoint.frozen_until > clock_.time();
  }
  void record(TraceKind kind, const Endpoint& at, uint32_t rail, uint64_t write, uint64_t detail) {
    trace_.add({clock_.time(), kind, at.rank, rail, write, detail});
  }
  EmulatedCounters& count(const Endpoint& endpoint) { return counters_[endpoint.rank]; }
  uint64_t below(uint64_t bound) { return random_() % bound; }
  Picoseconds after(std::chrono::nanoseconds time) const { return clock_.time() + time; }
  Picoseconds jitter();

  // The way of a write (emulated_transfer.cpp).
  void schedule_sending(Endpoint& endpoint, uint32_t rail);
  void send(Endpoint& endpoint, uint32_t rail);
  void arrive(uint32_t id, EmulatedPiece piece);
  void land(uint32_t id, EmulatedPiece piece);
  void resend(uint32_t id, EmulatedPiece piece);
  void notify(uint32_t id);
  void acknowledge(uint32_t id);
  void report_failure(uint32_t id, EfaStatus status);
  bool is_admitted(uint32_t id);
  void fail(uint32_t id, EfaStatus status, Picoseconds when);
  void leave_unanswered(uint32_t id, std::optional<EfaStatus> status);
  void take_from_nic(uint32_t id);
  bool is_fenced_off(uint32_t id);
  void leave_path(const Write& write);
  uint32_t piece_bytes(const Write& write, EmulatedPiece piece) const;
  Picoseconds transfer_time(uint32_t bytes) const;
  uint64_t checksum(const Write& write) const;
  std::byte* target_bytes(const Write& write) const;
  const std::byte* source_bytes(const Write& write) const;

  // Faults (emulated_faults.cpp).
  void strike(const Fault& fault);
  void strike_armed(Endpoint& endpoint, uint32_t rail, bool before_the_write);
  void strike_write(Endpoint& source, uint32_t id);
  void lose_nic(Endpoint& endpoint, uint32_t rail);
  void kill(Endpoint& endpoint, AfterDeath after_death,
            const std::optional<std::chrono::nanoseconds>& late_by);
  void let_land_after_death(uint32_t id, const std::optional<std::chrono::nanoseconds>& late_by);

  const EmulatedNetworkOptions options_;
  std::mt19937_64 random_;
  const uint64_t id_;  // tells this network's addresses from another's
  VirtualClock clock_;
  EventQueue<Event> events_;
  Trace trace_;
  std::vector<std::unique_ptr<Endpoint>> endpoints_;         // all incarnations
  std::unordered_map<uint32_t, uint32_t> newest_;            // endpoint by rank
  std::unordered_map<uint32_t, EmulatedCounters> counters_;  // by rank
  std::deque<Write> writes_;                                 // slots; references stay valid
  std::vector<uint32_t> free_writes_;
  uint64_t writes_created_ = 0;
  std::vector<Fault> scheduled_faults_;
  std::vector<uint32_t> woken_;
};

}  // namespace efa_ep
