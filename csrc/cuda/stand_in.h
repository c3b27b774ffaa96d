// The position of a rank that is gone, kept running on the GPU of a live one: its halves are kernels in
// streams of their own, with no tokens and no experts (cpu/stand_in.h says why). It begins a round when the
// kernels of the rank that serves it do, so that rounds of a replayed CUDA graph need nobody's call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/device.h"
#include "cuda/host_block.h"

namespace efa_ep::cuda {

class StandIn {
 public:
  /// `device` is the lost rank's, with its workspace in place, and `gpu` where that is; `server` is what the
  /// live rank shares with the host. Both outlive it.
  StandIn(CudaDevice& device, const HostBlock& server, int gpu);
  StandIn(const StandIn&) = delete;
  StandIn& operator=(const StandIn&) = delete;
  ~StandIn();

  /// Waits until every round that the server has begun is over, or `most` has passed; says which. Throws what
  /// ended a round.
  bool wait_until_idle(std::chrono::nanoseconds most);

  /// Begins no more rounds, and ends its thread; safe to repeat. Kernels that wait need the device's stop
  /// word.
  void stop();

  /// Rethrows what ended a round, in any thread, as often as it is asked.
  void throw_if_failed();

 private:
  void serve();
  bool begin_due();
  void run_round(uint32_t channel);
  uint64_t begun(uint32_t channel) const;
  bool idle();

  CudaDevice& device_;
  const HostBlock& server_;
  const int gpu_;
  std::vector<Stream> streams_;  // by channel
  std::atomic<bool> stop_{false};
  std::mutex mutex_;  // of all that follows
  std::vector<uint64_t> launched_;
  std::exception_ptr failure_;
  std::thread thread_;
};

}  // namespace efa_ep::cuda
