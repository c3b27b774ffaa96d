// What a rank did when, for a trace. A buffer has one writer at a time, keeps the newest spans of a fixed
// number, and is read when its writer has ended. Without capacity it costs a comparison.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace efa_ep {

struct TraceSpan {
  enum class Kind : uint32_t { kHalf, kWait, kWrite, kArrival };

  Kind kind = Kind::kHalf;
  uint32_t what = 0;  ///< Half of a half or wait, Operation of a write or arrival
  uint32_t channel = 0;
  uint32_t round = 0;
  uint32_t peer = kNoPeer;  ///< whom a wait was for, or the other end of a write
  uint32_t chunk = 0;
  uint32_t bytes = 0;
  uint64_t begin_ns = 0;  ///< of the steady clock
  uint64_t end_ns = 0;    ///< 0: it had not ended

  static constexpr uint32_t kNoPeer = UINT32_MAX;
};

class TraceBuffer {
 public:
  explicit TraceBuffer(size_t capacity = 0) : spans_(capacity) {}

  static uint64_t now_ns() { return nanoseconds(std::chrono::steady_clock::now()); }
  static uint64_t nanoseconds(std::chrono::steady_clock::time_point time) {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
  }

  bool enabled() const { return !spans_.empty(); }
  /// The number of the span that is added next.
  uint64_t next() const { return added_; }
  /// Only if enabled.
  void add(const TraceSpan& span) { spans_[added_++ % spans_.size()] = span; }
  /// Ends a span now, unless newer ones have taken its place. `number` may have lost its upper bits.
  void end(uint64_t number, uint64_t number_bits) {
    const uint64_t age = (added_ - number) & number_bits;
    if (age >= 1 && age <= spans_.size() && age <= added_)
      spans_[(added_ - age) % spans_.size()].end_ns = now_ns();
  }

  /// Oldest first.
  std::vector<TraceSpan> spans() const {
    std::vector<TraceSpan> newest;
    for (uint64_t number = dropped(); number < added_; ++number)
      newest.push_back(spans_[number % spans_.size()]);
    return newest;
  }
  /// Spans that newer ones have replaced.
  uint64_t dropped() const { return added_ - std::min<uint64_t>(added_, spans_.size()); }

 private:
  std::vector<TraceSpan> spans_;
  uint64_t added_ = 0;
};

}  // namespace efa_ep
