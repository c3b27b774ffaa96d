// What all who post writes to many destinations have in common.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "clock.h"
#include "errors.h"

namespace efa_ep {

/// How long a destination has refused writes.
class Refusal {
 public:
  void end() { since_.reset(); }
  /// Throws TransportError once `peer` has refused for longer than `timeout`.
  void note(uint32_t peer, DeadlineClock::TimePoint now, std::chrono::nanoseconds timeout) {
    if (!since_) since_ = now;
    if (now - *since_ <= timeout) return;
    const double seconds = std::chrono::duration<double>(timeout).count();
    throw TransportError("rank " + std::to_string(peer) + " accepted no write for " +
                             std::to_string(seconds) + " s; its process is gone or unreachable",
                         peer);
  }

 private:
  std::optional<DeadlineClock::TimePoint> since_;
};

}  // namespace efa_ep
