// Adds the time that a scope takes to a counter, to the sum of the current round, and to a trace.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "trace_buffer.h"

namespace efa_ep {

class ScopedTimer {
 public:
  ScopedTimer(std::atomic<uint64_t>& total, uint64_t& of_round, TraceBuffer& trace, const TraceSpan& span)
      : total_(total),
        of_round_(of_round),
        trace_(trace),
        span_(span),
        start_(std::chrono::steady_clock::now()) {}
  ~ScopedTimer() { stop(); }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

  /// What the trace will say about the scope.
  TraceSpan& span() { return span_; }

  /// Ends the time before the scope does.
  void stop() {
    if (stopped_) return;
    stopped_ = true;
    const auto end = std::chrono::steady_clock::now();
    const auto nanoseconds =
        static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(end - start_).count());
    total_.fetch_add(nanoseconds, std::memory_order_relaxed);
    of_round_ += nanoseconds;
    if (!trace_.enabled()) return;
    span_.begin_ns = TraceBuffer::nanoseconds(start_);
    span_.end_ns = TraceBuffer::nanoseconds(end);
    trace_.add(span_);
  }

 private:
  std::atomic<uint64_t>& total_;
  uint64_t& of_round_;
  TraceBuffer& trace_;
  TraceSpan span_;
  const std::chrono::steady_clock::time_point start_;
  bool stopped_ = false;
};

}  // namespace efa_ep
