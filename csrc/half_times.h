// What a device says of time: how long its halves took and waited, as histograms whose buckets double in
// width.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "protocol/half.h"

namespace efa_ep {

/// The first bucket ends at 1.024 us, the last but one at 69 s, and the last has no end.
inline constexpr size_t kDurationBuckets = 28;
using DurationCounts = std::array<uint64_t, kDurationBuckets>;

/// Longest duration, in nanoseconds, that belongs to `bucket` or one before it.
constexpr uint64_t duration_bound(size_t bucket) { return uint64_t{1} << (10 + bucket); }

/// Without the standard library's functions on bits, which device code does not have.
constexpr size_t duration_bucket(uint64_t nanoseconds) {
  size_t bucket = 0;
  while (bucket + 1 < kDurationBuckets && nanoseconds > duration_bound(bucket)) ++bucket;
  return bucket;
}

/// Totals since the start.
struct HalfTimes {
  std::array<uint64_t, kHalves> half_ns{};  ///< time inside each half
  std::array<uint64_t, kHalves> wait_ns{};  ///< of which waiting for other ranks
  /// One sample per complete round and half: its time, and the part of it that was waiting.
  std::array<DurationCounts, kHalves> half_histogram{}, wait_histogram{};
  /// [world] time of waits that this rank ended by being the last to arrive.
  std::vector<uint64_t> waited_for_ns;
};

}  // namespace efa_ep
