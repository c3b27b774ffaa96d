// Durations counted in the buckets of half_times.h: one relaxed addition per sample.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "half_times.h"

namespace efa_ep {

class DurationHistogram {
 public:
  void record(uint64_t nanoseconds) {
    counts_[duration_bucket(nanoseconds)].fetch_add(1, std::memory_order_relaxed);
  }

  /// Samples per bucket.
  DurationCounts counts() const {
    DurationCounts counts;
    for (size_t i = 0; i < kDurationBuckets; ++i) counts[i] = counts_[i].load(std::memory_order_relaxed);
    return counts;
  }

 private:
  std::array<std::atomic<uint64_t>, kDurationBuckets> counts_{};
};

}  // namespace efa_ep
