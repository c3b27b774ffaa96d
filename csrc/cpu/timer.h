// Adds the time that a scope takes to a counter.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace efa_ep {

class ScopedTimer {
 public:
  explicit ScopedTimer(std::atomic<uint64_t>& nanoseconds)
      : nanoseconds_(nanoseconds), start_(std::chrono::steady_clock::now()) {}
  ~ScopedTimer() {
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    nanoseconds_.fetch_add(
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count()),
        std::memory_order_relaxed);
  }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

 private:
  std::atomic<uint64_t>& nanoseconds_;
  const std::chrono::steady_clock::time_point start_;
};

}  // namespace efa_ep
