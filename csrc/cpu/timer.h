// Adds the time that a scope takes to a counter and to the sum of the current round.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace efa_ep {

class ScopedTimer {
 public:
  ScopedTimer(std::atomic<uint64_t>& total, uint64_t& of_round)
      : total_(total), of_round_(of_round), start_(std::chrono::steady_clock::now()) {}
  ~ScopedTimer() { stop(); }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

  /// Ends the time before the scope does.
  void stop() {
    if (stopped_) return;
    stopped_ = true;
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    const auto nanoseconds =
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
    total_.fetch_add(nanoseconds, std::memory_order_relaxed);
    of_round_ += nanoseconds;
  }

 private:
  std::atomic<uint64_t>& total_;
  uint64_t& of_round_;
  const std::chrono::steady_clock::time_point start_;
  bool stopped_ = false;
};

}  // namespace efa_ep
