// A world of CUDA ranks on an emulated network: kernels on fibers, the production proxies, and between the
// nodes all that EmulatedNetwork does to writes.
//
// Kernels and their deadlines take the machine's time, the network its own: one thread moves all of its
// traffic, and time goes on there whenever no proxy has anything to do.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_rank.h"
#include "cuda_world.h"
#include "fabric/emulated_fabric.h"
#include "proxy/signal_policy.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {

class EmulatedCudaWorld {
 public:
  /// In the moment before a rank's half of a round, from 1.
  struct Strike {
    Half half;
    uint32_t rank, channel, round;
    Fault fault;
  };

  EmulatedCudaWorld(const WorldConfig& config, const EmulatedProfile& profile,
                    const CudaRank::Options& options, std::vector<Strike> strikes = {})
      : config_(config),
        options_(options),
        network_({.profile = profile, .seed = config.seed, .check_sources = true}),
        strikes_(std::move(strikes)),
        ends_(config.world()) {
    for (uint32_t rank = 0; rank < config.world(); ++rank) arenas_.emplace_back(config.layout.total_bytes());
    build();
    thread_ = std::thread([this] {
      while (!stop_.load(std::memory_order_relaxed)) {
        if (!move_traffic()) std::this_thread::yield();
      }
    });
  }
  ~EmulatedCudaWorld() {
    stop_.store(true, std::memory_order_relaxed);
    thread_.join();
  }
  EmulatedCudaWorld(const EmulatedCudaWorld&) = delete;
  EmulatedCudaWorld& operator=(const EmulatedCudaWorld&) = delete;

  /// Builds a new generation, as all live ranks do after a loss: new endpoints, proxies and workspaces, in
  /// the memory of the old ones, which is registered anew. A lost rank's position takes part. Nobody strikes
  /// again.
  void renew(const CudaRank::Options& options) {
    const std::lock_guard lock(network_mutex_);
    options_ = options;
    strikes_.clear();
    // In this order: each needs the next.
    ranks_.clear();
    proxies_.clear();
    policies_.clear();
    fabrics_.clear();
    for (TestMemory& arena : arenas_) std::fill_n(arena.data(), arena.bytes(), std::byte{0});
    build();
  }

  /// Lets nothing happen on the network that is due later than this, until release().
  void hold(std::chrono::nanoseconds after) {
    const std::lock_guard lock(network_mutex_);
    held_from_ = network_.now() + after;
  }
  /// Whether anything is still on its way.
  bool in_flight() {
    const std::lock_guard lock(network_mutex_);
    return network_.next_event().has_value();
  }
  /// Lets all of it happen.
  void release() {
    {
      const std::lock_guard lock(network_mutex_);
      held_from_ = EmulatedNetwork::kForEver;
    }
    settle();
  }

  /// How a rank's rounds ended.
  struct End {
    bool finished = false;     ///< all rounds, with the plan's results
    std::exception_ptr error;  ///< what its caller would get; null if its process is gone or stands still
  };

  /// Runs all rounds of all ranks, each in its own thread. A rank that finishes is checked.
  void run(const CudaWorld::Plans& plans) {
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      threads.emplace_back([&, rank] { ends_[rank] = run_rank(rank, plans); });
    }
    for (std::thread& thread : threads) thread.join();
    settle();
  }
  const End& end(uint32_t rank) const { return ends_.at(rank); }
  /// After run().
  EmulatedCounters counters(uint32_t rank) const { return network_.counters(rank); }

 private:
  static constexpr std::chrono::nanoseconds kRefusalTimeout = std::chrono::milliseconds(50);
  static constexpr std::chrono::nanoseconds kIdleStep = std::chrono::microseconds(10);

  void build() {
    const Topology& topology = config_.layout.topology;
    for (uint32_t rank = 0; rank < config_.world(); ++rank) {
      fabrics_.push_back(std::make_unique<EmulatedFabric>(network_, rank));
      fabrics_[rank]->register_memory(arenas_[rank].data(), config_.layout.total_bytes());
    }
    for (uint32_t rank = 0; rank < config_.world(); ++rank) {
      for (uint32_t node = 0; node < topology.nodes(); ++node) {
        const uint32_t peer = topology.rail_peer(rank, node);
        if (peer != rank) fabrics_[rank]->connect(peer, fabrics_[peer]->address());
      }
      policies_.push_back(
          SignalPolicy::create(SignalPolicyKind::kCounted, *fabrics_[rank], network_.clock()));
      proxies_.push_back(std::make_unique<Proxy>(*policies_[rank], arenas_[rank].data(),
                                                 ProxyOptions{.layout = config_.layout,
                                                              .rank = rank,
                                                              .chunk_bytes = config_.chunk_bytes,
                                                              .ring_commands = config_.ring_commands,
                                                              .timeout = kRefusalTimeout,
                                                              .clock = &network_.clock()},
                                                 false));
    }
    for (uint32_t rank = 0; rank < config_.world(); ++rank) {
      std::vector<std::byte*> arenas;
      for (uint32_t index = 0; index < topology.ranks_per_node; ++index) {
        arenas.push_back(arenas_[topology.rank_at(topology.node_of(rank), index)].data());
      }
      ranks_.push_back(
          std::make_unique<CudaRank>(config_, rank, std::move(arenas), proxies_[rank].get(), options_));
    }
  }

  /// Gives every living proxy a turn; if none has anything to do, lets the network's time go on.
  bool move_traffic() {
    const std::lock_guard lock(network_mutex_);
    bool moved = false;
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!network_.alive(rank)) {
        ranks_[rank]->stop();  // the driver ends the kernels of a process that is gone
      } else if (!network_.frozen(rank)) {
        moved |= ranks_[rank]->pump();
      }
    }
    if (moved || (is_due() && network_.advance())) return true;
    network_.advance_to(network_.now() + kIdleStep);  // for posts that are refused without end
    return false;
  }

  bool is_due() const { return network_.next_event().value_or(held_from_) < held_from_; }

  /// Lets everything that is still on its way and not held arrive, and be told to its source.
  void settle() {
    const Patience patience;
    while (true) {
      patience.check();
      const std::lock_guard lock(network_mutex_);
      for (const auto& rank : ranks_) rank->pump();
      if (!is_due()) return;
    }
  }

  End run_rank(uint32_t rank, const CudaWorld::Plans& plans) {
    CudaRank& device = *ranks_[rank];
    for (uint32_t round = 0; round < plans[0].size(); ++round) {
      for (uint32_t half = 0; half < 4; ++half) {
        for (uint32_t channel = 0; channel < plans.size(); ++channel) {
          if (!comes_to(static_cast<Half>(half), rank, channel, round + 1)) return {};
          device.queue(static_cast<Half>(half), channel, plans[channel][round][rank]);
        }
        if (kSanitized) device.sync();
      }
    }
    device.sync();
    if (!runs(rank)) return {};
    try {
      device.throw_if_failed();
    } catch (...) {  // whatever it is, the test looks at it
      return {.finished = false, .error = std::current_exception()};
    }
    device.check();
    return {.finished = true, .error = nullptr};
  }

  /// Strikes what is due before this half. False if the rank's process does not get to it.
  bool comes_to(Half half, uint32_t rank, uint32_t channel, uint32_t round) {
    for (const Strike& strike : strikes_) {
      if (strike.half != half || strike.rank != rank || strike.channel != channel || strike.round != round)
        continue;
      ranks_[rank]->sync();
      const std::lock_guard lock(network_mutex_);
      Fault fault = strike.fault;
      fault.rank = rank;
      network_.inject(fault);
    }
    return runs(rank);
  }

  /// Whether a rank's process is alive and runs, once a freeze that ends is over.
  bool runs(uint32_t rank) {
    const Patience patience;
    while (true) {
      patience.check();
      {
        const std::lock_guard lock(network_mutex_);
        if (!network_.alive(rank)) return false;
        if (!network_.frozen(rank)) return true;
        if (!network_.next_event()) return false;
      }
      std::this_thread::yield();
    }
  }

  const WorldConfig config_;
  const testing::ScopedTrace trace_{__FILE__, __LINE__, testing::Message() << config_};
  CudaRank::Options options_;
  EmulatedNetwork network_;
  std::vector<Strike> strikes_;
  std::chrono::nanoseconds held_from_ = EmulatedNetwork::kForEver;
  std::vector<End> ends_;
  std::vector<TestMemory> arenas_;
  std::vector<std::unique_ptr<EmulatedFabric>> fabrics_;
  std::vector<std::unique_ptr<SignalPolicy>> policies_;
  std::vector<std::unique_ptr<Proxy>> proxies_;
  std::vector<std::unique_ptr<CudaRank>> ranks_;
  std::mutex network_mutex_;  // of the network, fabrics and proxies, while the thread runs
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace efa_ep
