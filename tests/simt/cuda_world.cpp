#include "cuda_world.h"

#include <gtest/gtest.h>

#include <exception>

#include "test_environment.h"

namespace efa_ep {
namespace {

void expect_no_fault(const cuda::DeviceError& error) {
  EXPECT_EQ(error.fault, cuda::Fault::kNone)
      << "in half " << static_cast<int>(error.half) << " of round " << error.round << ", channel "
      << error.channel << ": rank " << error.rank << ", " << error.detail;
}

}  // namespace

CudaWorld::CudaWorld(const WorldConfig& config, const CudaRank::Options& options,
                     const std::function<bool(uint32_t)>& is_cuda)
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

CudaWorld::~CudaWorld() {
  stop_.store(true, std::memory_order_relaxed);
  network_.join();
}

void CudaWorld::run(const Plans& plans) {
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

std::unique_ptr<CudaRank> CudaWorld::make_rank(uint32_t rank, const CudaRank::Options& options) {
  const Topology& topology = world_.config().layout.topology;
  std::vector<std::byte*> arenas;
  for (uint32_t index = 0; index < topology.ranks_per_node; ++index) {
    arenas.push_back(world_.arena(topology.rank_at(topology.node_of(rank), index)));
  }
  return std::make_unique<CudaRank>(world_.config(), rank, arenas, world_.proxy(rank), options);
}

void CudaWorld::run_on_cuda(uint32_t rank, const Plans& plans) {
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

void CudaWorld::run_on_cpu(uint32_t rank, const Plans& plans) {
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

CudaWorld::Plans plan_rounds(const WorldConfig& config) {
  Planner planner(config);
  CudaWorld::Plans plans(config.layout.channels);
  for (auto& rounds : plans) {
    for (uint32_t round = 0; round < config.rounds; ++round) rounds.push_back(planner.plan());
  }
  return plans;
}

}  // namespace efa_ep
