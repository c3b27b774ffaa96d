// A network inside one process that takes every liberty that fabric.h allows: writes and the pieces of a
// write are placed in random order, an immediate comes after its bytes and in no order with anything else, a
// source learns of its write before or after the target does, and queues are short. One seed gives one
// sequence of choices. Bytes are copied from source to target only when they are placed, and a source must
// not change until its write is complete, as if the NIC had to send it again. A completion queue that
// overruns is lost. One mutex is all that orders ranks: the sanitizers see who relies on more.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <vector>

#include "fabric/fabric.h"

namespace efa_ep {

class LoopbackNetwork {
 public:
  struct Options {
    uint32_t ranks = 2;
    uint32_t rails = 1;
    uint32_t send_queue_depth = 16;
    uint32_t completion_queue_depth = 1024;
    /// Unpolled completions beyond that depth which do no harm: for senders that do not bound what a target
    /// leaves unpolled.
    uint32_t overrun_room = 0;
    uint64_t seed = 1;
    bool honours_fence = false;  ///< otherwise a fence orders nothing, as on EFA
    /// As over TCP: who did not ask for delivery may be told of a write while its bytes are on their way.
    bool early_completions = false;
  };

  enum class Fault {
    kNone,
    kRefuse,         ///< post_write() answers kAgain
    kFail,           ///< nothing is placed, the completion is an error
    kNeverComplete,  ///< arrives, but the source never learns of it
  };
  /// Asked at every post, under the network's lock, so it may also record what it sees.
  using Rule = std::function<Fault(uint32_t source, const WriteRequest&)>;

  /// What one rank did, as the network saw it.
  struct Traffic {
    uint64_t writes = 0;
    uint64_t bytes = 0;
    uint64_t refusals = 0;
    uint64_t silent = 0;  ///< writes without an immediate
    uint64_t fenced = 0;
    uint64_t completions = 0;           ///< own writes, polled
    uint64_t arrivals = 0;              ///< writes of peers, polled
    std::vector<uint32_t> outstanding;  ///< per peer: posted, completion not polled
    std::vector<uint32_t> most_outstanding;
  };

  explicit LoopbackNetwork(const Options& options);
  ~LoopbackNetwork();
  LoopbackNetwork(const LoopbackNetwork&) = delete;
  LoopbackNetwork& operator=(const LoopbackNetwork&) = delete;

  Fabric& endpoint(uint32_t rank);
  void set_rule(Rule rule);
  /// While held, writes arrive, but no source learns of its own. Orders the caller with nobody.
  void hold_completions(bool hold) { completions_held_.store(hold, std::memory_order_relaxed); }
  /// Whether everything posted has arrived and completed, polled or not.
  bool idle();
  Traffic traffic(uint32_t rank);

 private:
  struct Endpoint;
  struct Event;
  struct Write;

  PostResult post(Endpoint& source, const WriteRequest& request);
  size_t poll(Endpoint& endpoint, std::span<Completion> completions);
  // One thing happens to one write.
  void step();
  void tell(Endpoint& endpoint, const Event& event);
  // Whether a fence at or before this write has something before it that is not placed.
  bool must_wait(const Write& write) const;
  uint32_t below(size_t bound) { return static_cast<uint32_t>(random_() % bound); }

  std::mutex mutex_;
  std::mt19937_64 random_;
  uint32_t overrun_room_ = 0;
  FabricDescription description_;
  bool early_completions_ = false;
  Rule rule_;
  std::atomic<bool> completions_held_{false};
  std::vector<std::unique_ptr<Endpoint>> endpoints_;
  std::vector<Write> writes_;
  uint64_t posted_ = 0;
};

}  // namespace efa_ep
