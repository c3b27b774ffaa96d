// The position of a rank that is gone, kept running by the process of a live one: it sends no tokens and has
// no experts, but its rail peers' rows are forwarded and its signals are given, so the protocol misses
// nobody.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/device.h"

namespace efa_ep {

class StandIn {
 public:
  /// Takes the rank of `options`, which owns no expert. `arenas` and `proxy` as in CpuDevice; they outlive
  /// it. Its waits end with stop(), not with `options.check_interrupt`.
  StandIn(CpuDeviceOptions options, std::vector<std::byte*> arenas, Proxy* proxy);
  StandIn(const StandIn&) = delete;
  StandIn& operator=(const StandIn&) = delete;
  ~StandIn() { stop(); }

  /// Lets a thread of the channel run one round more. A round begins only when a live rank begins it, so that
  /// a world at rest has no deadline running.
  void start_round(uint32_t channel);

  /// Waits until every round that was started is over, or `most` has passed; says which. Throws what ended a
  /// round.
  bool wait_until_idle(std::chrono::nanoseconds most);

  /// Ends its threads, within a round if need be; safe to repeat.
  void stop();

  /// Rethrows what ended a round, in any thread, as often as it is asked.
  void throw_if_failed();

 private:
  struct Channel {
    uint64_t started = 0;
    uint64_t finished = 0;
  };

  void serve(uint32_t channel);
  void run_round(uint32_t channel);
  bool idle() const;

  std::mutex mutex_;  // of all that follows, but the device
  std::condition_variable changed_;
  std::vector<Channel> channels_;
  std::exception_ptr failure_;
  std::atomic<bool> stop_{false};
  CpuDevice device_;
  std::vector<std::thread> threads_;
};

}  // namespace efa_ep
