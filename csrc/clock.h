// Where deadlines take the time from: the machine, or a network that emulates time.
#pragma once

#include <chrono>

namespace efa_ep {

class DeadlineClock {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  /// Never goes back.
  virtual TimePoint now() const = 0;

 protected:
  ~DeadlineClock() = default;
};

/// The machine's.
class SteadyClock final : public DeadlineClock {
 public:
  TimePoint now() const override { return std::chrono::steady_clock::now(); }
};
inline constexpr SteadyClock kSteadyClock;

}  // namespace efa_ep
