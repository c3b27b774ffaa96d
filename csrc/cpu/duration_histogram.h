// How long something took, counted in buckets that double in width: one relaxed addition per sample.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace efa_ep {

class DurationHistogram {
 public:
  /// The first bucket ends at 1.024 us, the last but one at 69 s, and the last has no end.
  static constexpr size_t kBuckets = 28;
  using Counts = std::array<uint64_t, kBuckets>;

  /// Longest duration, in nanoseconds, that belongs to `bucket` or one before it.
  static constexpr uint64_t bound(size_t bucket) { return uint64_t{1} << (kFirstBoundBits + bucket); }

  static constexpr size_t bucket_of(uint64_t nanoseconds) {
    const auto bits = static_cast<size_t>(std::bit_width(nanoseconds - (nanoseconds > 0)));
    return std::min(std::max(bits, kFirstBoundBits) - kFirstBoundBits, kBuckets - 1);
  }

  void record(uint64_t nanoseconds) {
    counts_[bucket_of(nanoseconds)].fetch_add(1, std::memory_order_relaxed);
  }

  /// Samples per bucket.
  Counts counts() const {
    Counts counts;
    for (size_t i = 0; i < kBuckets; ++i) counts[i] = counts_[i].load(std::memory_order_relaxed);
    return counts;
  }

 private:
  static constexpr size_t kFirstBoundBits = 10;
  std::array<std::atomic<uint64_t>, kBuckets> counts_{};
};

}  // namespace efa_ep
