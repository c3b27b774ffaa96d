#include "emulated_cuda_world.h"

#include <algorithm>
#include <utility>

#include "test_environment.h"

namespace efa_ep {
namespace {

constexpr std::chrono::nanoseconds kRefusalTimeout = std::chrono::milliseconds(50);
constexpr std::chrono::nanoseconds kIdleStep = std::chrono::microseconds(10);

}  // namespace

EmulatedCudaWorld::EmulatedCudaWorld(const WorldConfig& config, const EmulatedProfile& profile,
                                     const CudaRank::Options& options, std::vector<Strike> strikes)
    : config_(config),
      trace_(__FILE__, __LINE__, testing::Message() << config_),
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

EmulatedCudaWorld::~EmulatedCudaWorld() {
  stop_.store(true, std::memory_order_relaxed);
  thread_.join();
}

void EmulatedCudaWorld::renew(const CudaRank::Options& options) {
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

void EmulatedCudaWorld::hold(std::chrono::nanoseconds after) {
  const std::lock_guard lock(network_mutex_);
  held_from_ = network_.now() + after;
}

bool EmulatedCudaWorld::in_flight() {
  const std::lock_guard lock(network_mutex_);
  return network_.next_event().has_value();
}

void EmulatedCudaWorld::release() {
  {
    const std::lock_guard lock(network_mutex_);
    held_from_ = EmulatedNetwork::kForEver;
  }
  settle();
}

void EmulatedCudaWorld::run(const CudaWorld::Plans& plans) {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    threads.emplace_back([&, rank] { ends_[rank] = run_rank(rank, plans); });
  }
  for (std::thread& thread : threads) thread.join();
  settle();
}

void EmulatedCudaWorld::build() {
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
    policies_.push_back(SignalPolicy::create(SignalPolicyKind::kCounted, *fabrics_[rank], network_.clock()));
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

bool EmulatedCudaWorld::move_traffic() {
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

bool EmulatedCudaWorld::is_due() const { return network_.next_event().value_or(held_from_) < held_from_; }

void EmulatedCudaWorld::settle() {
  const Patience patience;
  while (true) {
    patience.check();
    const std::lock_guard lock(network_mutex_);
    for (const auto& rank : ranks_) rank->pump();
    if (!is_due()) return;
  }
}

EmulatedCudaWorld::End EmulatedCudaWorld::run_rank(uint32_t rank, const CudaWorld::Plans& plans) {
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

bool EmulatedCudaWorld::comes_to(Half half, uint32_t rank, uint32_t channel, uint32_t round) {
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

bool EmulatedCudaWorld::runs(uint32_t rank) {
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

}  // namespace efa_ep
