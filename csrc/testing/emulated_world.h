// A whole world in one process and one thread: CPU devices and proxies of the production code, plain memory
// for arenas, an emulated network between the nodes, virtual time. One seed gives one run.
//
// Devices take no virtual time: what a run's clock shows is the network's share.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "cpu/device.h"
#include "fabric/emulated_fabric.h"
#include "proxy/proxy.h"
#include "proxy/signal_policy.h"

namespace efa_ep {

struct EmulatedWorldOptions {
  Layout layout;
  std::vector<uint32_t> expert_owner;  ///< owner rank of every expert
  ScalarType combine_type = ScalarType::kBfloat16;
  bool per_expert = false;
  SignalPolicyKind signal_policy = SignalPolicyKind::kCounted;
  uint64_t chunk_bytes = 256 * 1024;
  uint32_t ring_commands = 4096;  ///< at least the chunks that one rank sends in a round, over all channels
  std::chrono::nanoseconds timeout = std::chrono::seconds(1);  ///< virtual, of every half
  EmulatedNetworkOptions network = {};
};

/// A round of one rank on one channel.
struct EmulatedTurn {
  uint32_t rank = 0;
  uint32_t channel = 0;
  uint32_t round = 0;  ///< from 1
};

/// What the ranks of a world compute: called half by half, and what it passes stays valid until the next call
/// of that rank and channel.
class EmulatedWorkload {
 public:
  virtual ~EmulatedWorkload() = default;
  virtual DispatchInput tokens(const EmulatedTurn& turn) = 0;
  /// Where `rows` received rows go.
  virtual DispatchOutput receive(const EmulatedTurn& turn, uint32_t rows) = 0;
  /// What the experts make of them.
  virtual CombineInput results(const EmulatedTurn& turn) = 0;
  /// Where the round's output goes.
  virtual std::byte* output(const EmulatedTurn& turn) = 0;
  virtual void finished(const EmulatedTurn& turn) = 0;
};

class EmulatedWorld {
 public:
  explicit EmulatedWorld(const EmulatedWorldOptions& options);

  /// Runs `rounds` more rounds on every channel, ranks in random turns and each as far ahead of the others as
  /// the protocol lets it. Ends when the network is at rest and every rank has finished, failed, died or is
  /// frozen for good. A rank that fails keeps its error and does nothing any more.
  void run(EmulatedWorkload& workload, uint32_t rounds);

  /// What mask() of the Python package does, agreed on already: new arenas, endpoints, proxies and devices,
  /// on which run() goes on with the next rounds. `server_of[r]` is r for a live rank; a lost one's position
  /// is served by that rank, which lets it begin a round when it does: on the NICs that were its own, or on
  /// the server's if that is of another node.
  void mask(std::vector<uint32_t> server_of);

  /// Injects a fault in the moment before a rank's half.
  void inject_before(Half half, const EmulatedTurn& turn, const Fault& fault);

  /// What a rank's half ended in; empty if it did not fail.
  std::exception_ptr error(uint32_t rank) const { return ranks_.at(rank).error; }
  /// Rounds that a rank has finished on a channel.
  uint32_t finished_rounds(uint32_t rank, uint32_t channel) const {
    return ranks_.at(rank).channels.at(channel).finished;
  }

  EmulatedNetwork& network() { return network_; }
  CpuDevice& device(uint32_t rank) { return *ranks_.at(rank).device; }
  /// Null in a world of one node.
  Proxy* proxy(uint32_t rank) { return ranks_.at(rank).proxy.get(); }
  SignalPolicy* policy(uint32_t rank) { return ranks_.at(rank).policy.get(); }
  std::byte* arena(uint32_t rank) { return ranks_.at(rank).arena.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  struct Channel {
    Half half = Half::kDispatchSend;  // the next
    uint32_t finished = 0;
    uint32_t last = 0;  // round to finish
    std::chrono::nanoseconds since{};
  };
  /// A device's clock. The world waits in the device's stead, so a device that is asked to wait all the same
  /// is told when its half began, and from then on what time it is.
  class HalfClock final : public DeadlineClock {
   public:
    void use(const DeadlineClock& network) { network_ = &network; }
    void begin(std::chrono::nanoseconds since) { since_ = since; }
    TimePoint now() const override {
      const auto since = std::exchange(since_, std::nullopt);
      return since ? TimePoint(*since) : network_->now();
    }

   private:
    const DeadlineClock* network_ = nullptr;
    mutable std::optional<std::chrono::nanoseconds> since_;
  };
  struct Rank {
    std::unique_ptr<std::byte, Free> arena;
    std::unique_ptr<EmulatedFabric> fabric;
    std::unique_ptr<SignalPolicy> policy;
    std::unique_ptr<Proxy> proxy;
    HalfClock clock;
    std::unique_ptr<CpuDevice> device;
    std::vector<Channel> channels;
    uint64_t received_rows = 0;  // of all rounds and channels
    std::vector<uint32_t> stands_in_for;
    std::exception_ptr error;
    bool queued = false;
  };
  struct HalfFault {
    Half half;
    EmulatedTurn turn;
    Fault fault;
  };

  void build();
  void open(uint32_t rank);
  void connect(uint32_t rank);
  void make_device(uint32_t rank);
  void enqueue(uint32_t rank);
  uint32_t take_queued();
  void step(uint32_t rank);
  bool advance_channel(uint32_t rank, uint32_t channel);
  bool may_finish(uint32_t rank, uint32_t channel);
  bool may_begin(uint32_t rank, uint32_t channel) const;
  void finish_half(uint32_t rank, uint32_t channel);
  void inject_due(const EmulatedTurn& turn, Half half);
  bool is_running(uint32_t rank, const Channel& channel) const;
  std::chrono::nanoseconds deadline_of(uint32_t rank) const;
  std::chrono::nanoseconds earliest_deadline() const;
  void expire();
  template <class Work>
  void guard(uint32_t rank, const Work& work);
  bool is_stand_in(uint32_t rank) const { return server_of_[rank] != rank; }
  /// A stand-in whose whole node is lost.
  bool is_guest(uint32_t rank) const {
    const Topology& topology = options_.layout.topology;
    return topology.node_of(server_of_[rank]) != topology.node_of(rank);
  }
  EmulatedTurn turn_of(uint32_t rank, uint32_t channel) const {
    return {rank, channel, ranks_[rank].channels[channel].finished + 1};
  }

  const EmulatedWorldOptions options_;
  EmulatedNetwork network_;
  std::mt19937_64 random_;
  std::vector<Rank> ranks_;
  std::vector<uint32_t> server_of_;
  std::vector<uint32_t> queue_;  // ranks that may have something to do
  std::vector<HalfFault> faults_;
  std::chrono::nanoseconds no_deadline_before_{};  // saves asking every rank after every event
  EmulatedWorkload* workload_ = nullptr;
};

}  // namespace efa_ep
