// A World of which some or all ranks run the CUDA kernels, and the thread that moves their traffic.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_rank.h"
#include "test_environment.h"
#include "world.h"

namespace efa_ep {

class CudaWorld {
 public:
  /// Ranks for which `is_cuda` is false keep the World's CPU device.
  CudaWorld(
      const WorldConfig& config, const CudaRank::Options& options,
      const std::function<bool(uint32_t)>& is_cuda = [](uint32_t) { return true; })
      : world_(config) {
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      ranks_.push_back(is_cuda(rank) ? make_rank(rank, options) : nullptr);
    }
    network_ = std::thread([this] {
      while (!stop_.load(std::memory_order_relaxed)) {
        bool moved = false;
        for (const auto& rank : ranks_) moved |= rank != nullptr && rank->pump();
        if (!moved) std::this_thread::yield();
      }
    });
  }
  ~CudaWorld() {
    stop_.store(true, std::memory_order_relaxed);
    network_.join();
  }
  CudaWorld(const CudaWorld&) = delete;
  CudaWorld& operator=(const CudaWorld&) = delete;

  World& world() { return world_; }
  CudaRank& rank(uint32_t rank) { return *ranks_.at(rank); }

  /// [channel][round][rank]
  using Plans = std::vector<std::vector<std::vector<RankRound>>>;

  /// Runs all rounds of all ranks, each in its own thread, and checks what they write.
  void run(const Plans& plans) {
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      threads.emplace_back(
          [&, rank] { ranks_[rank] == nullptr ? run_on_cpu(rank, plans) : run_on_cuda(rank, plans); });
    }
    for (std::thread& thread : threads) thread.join();
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      // What has arrived need not be counted yet.
      if (world_.proxy(rank) != nullptr) world_.proxy(rank)->drain(kPatience);
    }
    for (const auto& rank : ranks_) {
      if (rank == nullptr) continue;
      expect_no_fault(rank->error());
      rank->check();
    }
  }

 private:
  std::unique_ptr<CudaRank> make_rank(uint32_t rank, const CudaRank::Options& options) {
    const Topology& topology = world_.config().layout.topology;
    std::vector<std::byte*> arenas;
    for (uint32_t index = 0; index < topology.ranks_per_node; ++index) {
      arenas.push_back(world_.arena(topology.rank_at(topology.node_of(rank), index)));
    }
    return std::make_unique<CudaRank>(world_.config(), rank, arenas, world_.proxy(rank), options);
  }

  static void expect_no_fault(const cuda::DeviceError& error) {
    EXPECT_EQ(error.fault, cuda::Fault::kNone)
        << "in half " << static_cast<int>(error.half) << " of round " << error.round << ", channel "
        << error.channel << ": rank " << error.rank << ", " << error.detail;
  }

  /// Queues everything at once, as a captured graph would: nothing but the protocol holds the rank back.
  /// Under a sanitizer one half at a time, since the engine keeps a kernel's memory until the host has waited
  /// for it.
  void run_on_cuda(uint32_t rank, const Plans& plans) {
    CudaRank& device = *ranks_[rank];
    for (size_t round = 0; round < plans[0].size(); ++round) {
      for (uint32_t half = 0; half < 4; ++half) {
        for (uint32_t channel = 0; channel < plans.size(); ++channel) {
          device.queue(static_cast<Half>(half), channel, plans[channel][round][rank]);
        }
        if (kSanitized) device.sync();
      }
    }
    device.sync();
  }

  void run_on_cpu(uint32_t rank, const Plans& plans) {
    try {
      for (size_t round = 0; round < plans[0].size(); ++round) {
        for (uint32_t half = 0; half < 4; ++half) {
          for (uint32_t channel = 0; channel < plans.size(); ++channel) {
            world_.run(static_cast<Half>(half), rank, channel, plans[channel][round][rank]);
          }
        }
      }
      if (world_.proxy(rank) != nullptr) world_.proxy(rank)->drain(kPatience);
    } catch (const std::exception& error) {
      ADD_FAILURE() << "CPU rank " << rank << ": " << error.what();
    }
  }

  World world_;
  std::vector<std::unique_ptr<CudaRank>> ranks_;
  std::atomic<bool> stop_{false};
  std::thread network_;
};

inline CudaWorld::Plans plan_rounds(const WorldConfig& config) {
  Planner planner(config);
  CudaWorld::Plans plans(config.layout.channels);
  for (auto& rounds : plans) {
    for (uint32_t round = 0; round < config.rounds; ++round) rounds.push_back(planner.plan());
  }
  return plans;
}

}  // namespace efa_ep
