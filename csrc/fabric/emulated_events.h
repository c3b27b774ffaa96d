// Virtual time: a queue of what will happen when, and the clock that follows it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <ratio>
#include <vector>

#include "clock.h"

namespace efa_ep {

/// Fine enough that the time of a piece at hundreds of Gb/s needs no rounding; lasts for 106 days.
using Picoseconds = std::chrono::duration<int64_t, std::pico>;

class VirtualClock final : public DeadlineClock {
 public:
  TimePoint now() const override { return TimePoint(nanoseconds()); }
  std::chrono::nanoseconds nanoseconds() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time_);
  }
  Picoseconds time() const { return time_; }
  void set(Picoseconds time) { time_ = time; }

 private:
  Picoseconds time_{0};
};

/// Hands out events in order of time, those of one time in the order in which they were put in.
template <class Event>
class EventQueue {
 public:
  bool empty() const { return heap_.empty(); }
  Picoseconds next_time() const { return heap_.front().time; }

  void push(Picoseconds time, const Event& event) {
    heap_.push_back({time, pushed_++, event});
    std::push_heap(heap_.begin(), heap_.end(), later);
  }
  Event pop() {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    const Event event = heap_.back().event;
    heap_.pop_back();
    return event;
  }

 private:
  struct Entry {
    Picoseconds time;
    uint64_t number;
    Event event;
  };
  static bool later(const Entry& a, const Entry& b) {
    return a.time != b.time ? a.time > b.time : a.number > b.number;
  }

  std::vector<Entry> heap_;
  uint64_t pushed_ = 0;
};

}  // namespace efa_ep
