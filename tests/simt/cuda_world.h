// A World of which some or all ranks run the CUDA kernels, and the thread that moves their traffic.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_rank.h"
#include "world.h"

namespace efa_ep {

class CudaWorld {
 public:
  /// Ranks for which `is_cuda` is false keep the World's CPU device.
  CudaWorld(
      const WorldConfig& config, const CudaRank::Options& options,
      const std::function<bool(uint32_t)>& is_cuda = [](uint32_t) { return true; });
  ~CudaWorld();
  CudaWorld(const CudaWorld&) = delete;
  CudaWorld& operator=(const CudaWorld&) = delete;

  World& world() { return world_; }
  CudaRank& rank(uint32_t rank) { return *ranks_.at(rank); }

  /// [channel][round][rank]
  using Plans = std::vector<std::vector<std::vector<RankRound>>>;

  /// Runs all rounds of all ranks, each in its own thread, and checks what they write.
  void run(const Plans& plans);

 private:
  std::unique_ptr<CudaRank> make_rank(uint32_t rank, const CudaRank::Options& options);
  /// Queues everything at once, as a captured graph would: nothing but the protocol holds the rank back.
  /// Under a sanitizer one half at a time, since the engine keeps a kernel's memory until the host has waited
  /// for it.
  void run_on_cuda(uint32_t rank, const Plans& plans);
  void run_on_cpu(uint32_t rank, const Plans& plans);

  World world_;
  std::vector<std::unique_ptr<CudaRank>> ranks_;
  std::atomic<bool> stop_{false};
  std::thread network_;
};

CudaWorld::Plans plan_rounds(const WorldConfig& config);

}  // namespace efa_ep
