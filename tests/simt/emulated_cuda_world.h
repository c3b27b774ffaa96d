// A world of CUDA ranks on an emulated network: kernels on fibers, the production proxies, and between the
// nodes all that EmulatedNetwork does to writes.
//
// Kernels and their deadlines take the machine's time, the network its own: one thread moves all of its
// traffic, and time goes on there whenever no proxy has anything to do.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda_rank.h"
#include "cuda_world.h"
#include "fabric/emulated_fabric.h"
#include "proxy/signal_policy.h"
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
                    const CudaRank::Options& options, std::vector<Strike> strikes = {});
  ~EmulatedCudaWorld();
  EmulatedCudaWorld(const EmulatedCudaWorld&) = delete;
  EmulatedCudaWorld& operator=(const EmulatedCudaWorld&) = delete;

  /// Builds a new generation, as all live ranks do after a loss: new endpoints, proxies and workspaces, in
  /// the memory of the old ones, which is registered anew. A lost rank's position takes part. Nobody strikes
  /// again.
  void renew(const CudaRank::Options& options);

  /// Lets nothing happen on the network that is due later than this, until release().
  void hold(std::chrono::nanoseconds after);
  /// Whether anything is still on its way.
  bool in_flight();
  /// Lets all of it happen.
  void release();

  /// How a rank's rounds ended.
  struct End {
    bool finished = false;     ///< all rounds, with the plan's results
    std::exception_ptr error;  ///< what its caller would get; null if its process is gone or stands still
  };

  /// Runs all rounds of all ranks, each in its own thread. A rank that finishes is checked.
  void run(const CudaWorld::Plans& plans);
  const End& end(uint32_t rank) const { return ends_.at(rank); }
  /// After run().
  EmulatedCounters counters(uint32_t rank) const { return network_.counters(rank); }

 private:
  void build();
  /// Gives every living proxy a turn; if none has anything to do, lets the network's time go on.
  bool move_traffic();
  bool is_due() const;
  /// Lets everything that is still on its way and not held arrive, and be told to its source.
  void settle();
  End run_rank(uint32_t rank, const CudaWorld::Plans& plans);
  /// Strikes what is due before this half. False if the rank's process does not get to it.
  bool comes_to(Half half, uint32_t rank, uint32_t channel, uint32_t round);
  /// Whether a rank's process is alive and runs, once a freeze that ends is over.
  bool runs(uint32_t rank);

  const WorldConfig config_;
  const testing::ScopedTrace trace_;
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
