// A world of CPU devices in one process: ranks are threads, arenas plain memory, the network a loopback.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <vector>

#include "cpu/device.h"
#include "loopback_network.h"
#include "test_environment.h"
#include "world_plan.h"

namespace efa_ep {

class World {
 public:
  explicit World(const WorldConfig& config, std::chrono::nanoseconds timeout = kPatience);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  const WorldConfig& config() const { return config_; }
  LoopbackNetwork& network() { return network_; }
  CpuDevice& device(uint32_t rank) { return *devices_.at(rank); }
  Proxy* proxy(uint32_t rank) { return proxies_.at(rank).get(); }
  std::byte* arena(uint32_t rank) { return arenas_.at(rank).data(); }

  // The four halves of one rank, with checked results. Inputs lie in memory that is overwritten and freed as
  // soon as a half has returned, or where the device wants them; outputs lie in memory of exactly their size.

  void dispatch_send(uint32_t rank, uint32_t channel, const RankRound& round);
  void dispatch_recv(uint32_t rank, uint32_t channel, const RankRound& round);
  void combine_send(uint32_t rank, uint32_t channel, const RankRound& round);
  void combine_recv(uint32_t rank, uint32_t channel, const RankRound& round);
  void run(Half half, uint32_t rank, uint32_t channel, const RankRound& round);

 private:
  const WorldConfig config_;
  const testing::ScopedTrace trace_;
  LoopbackNetwork network_;
  std::vector<TestMemory> arenas_;
  std::vector<std::unique_ptr<SignalPolicy>> policies_;
  std::vector<std::unique_ptr<Proxy>> proxies_;
  std::vector<std::unique_ptr<CpuDevice>> devices_;
};

}  // namespace efa_ep
