// What happened in an emulated network: a hash of everything, and the last events in words.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <string>

#include "fabric/emulated_events.h"

namespace efa_ep {

enum class TraceKind : uint8_t {
  kPosted,     ///< detail: bytes
  kRefused,    ///< detail: bytes
  kLost,       ///< a piece; detail: its number
  kLanded,     ///< a piece; detail: its number
  kArrived,    ///< the target may poll the immediate; detail: the immediate
  kCompleted,  ///< the source may poll the completion
  kFailed,     ///< the source may poll the error; detail: status
  kOverrun,    ///< of a completion queue
  kFault,      ///< detail: FaultKind
};
inline constexpr std::array<const char*, 9> kTraceNames = {
    "posted", "refused", "lost", "landed", "arrived", "completed", "failed", "overrun", "fault"};

struct TraceEvent {
  Picoseconds time{};
  TraceKind kind = TraceKind::kPosted;
  uint32_t rank = 0;  ///< at which it happened
  uint32_t rail = 0;
  uint64_t write = 0;  ///< counts the network's writes from 1; 0: no write
  uint64_t detail = 0;

  std::string text() const {
    return std::to_string(time.count()) + " ps: rank " + std::to_string(rank) + " rail " +
           std::to_string(rail) + " " + kTraceNames[static_cast<size_t>(kind)] + " write " +
           std::to_string(write) + " (" + std::to_string(detail) + ")";
  }
  bool operator==(const TraceEvent&) const = default;
};

class Trace {
 public:
  /// Keeps the last `logged` events.
  explicit Trace(size_t logged) : logged_(logged) {}

  void add(const TraceEvent& event) {
    for (const uint64_t word :
         {static_cast<uint64_t>(event.time.count()),
          uint64_t{event.rank} << 32 | uint64_t{event.rail} << 8 | static_cast<uint64_t>(event.kind),
          event.write, event.detail}) {
      hash_ = std::rotl((hash_ ^ word) * 0x9E3779B97F4A7C15, 29);
    }
    ++events_;
    if (logged_ == 0) return;
    if (log_.size() == logged_) log_.pop_front();
    log_.push_back(event);
  }

  uint64_t hash() const { return hash_; }
  uint64_t events() const { return events_; }
  const std::deque<TraceEvent>& log() const { return log_; }

 private:
  const size_t logged_;
  uint64_t hash_ = 0;
  uint64_t events_ = 0;
  std::deque<TraceEvent> log_;
};

}  // namespace efa_ep
