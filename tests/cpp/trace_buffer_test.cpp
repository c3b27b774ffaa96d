// Histograms of durations and buffers of spans: bounds, and what happens when there is more than fits.
#include "trace_buffer.h"

#include <gtest/gtest.h>

#include "cpu/duration_histogram.h"

namespace efa_ep {
namespace {

TEST(DurationHistogram, ABoundBelongsToItsBucket) {
  EXPECT_EQ(duration_bucket(0), 0u);
  for (size_t bucket = 0; bucket + 1 < kDurationBuckets; ++bucket) {
    EXPECT_EQ(duration_bucket(duration_bound(bucket)), bucket);
    EXPECT_EQ(duration_bucket(duration_bound(bucket) + 1), bucket + 1);
  }
  EXPECT_EQ(duration_bucket(UINT64_MAX), kDurationBuckets - 1);
}

TEST(DurationHistogram, CountsSamples) {
  DurationHistogram histogram;
  for (const uint64_t sample : {1ull, 1024ull, 1025ull, 1ull << 40}) histogram.record(sample);
  DurationCounts expected{};
  expected[0] = 2;
  expected[1] = 1;
  expected[kDurationBuckets - 1] = 1;
  EXPECT_EQ(histogram.counts(), expected);
}

TEST(TraceBuffer, KeepsTheNewestSpans) {
  TraceBuffer buffer(3);
  for (uint32_t round = 1; round <= 5; ++round) buffer.add({.round = round});
  std::vector<uint32_t> rounds;
  for (const TraceSpan& span : buffer.spans()) rounds.push_back(span.round);
  EXPECT_EQ(rounds, (std::vector<uint32_t>{3, 4, 5}));
  EXPECT_EQ(buffer.dropped(), 2u);
}

TEST(TraceBuffer, EndsOnlyTheSpanThatItNames) {
  constexpr uint64_t kBits = 0x7;  // numbers are told apart over 8 spans
  TraceBuffer buffer(3);
  uint64_t first = 0, last = 0;
  for (uint32_t round = 0; round < 20; ++round) {
    if (round == 13) first = buffer.next() & kBits;
    if (round == 19) last = buffer.next() & kBits;
    buffer.add({.round = round});
  }
  buffer.end(first, kBits);  // replaced
  for (const TraceSpan& span : buffer.spans()) EXPECT_EQ(span.end_ns, 0u);
  buffer.end(last, kBits);
  EXPECT_EQ(buffer.spans()[1].end_ns, 0u);
  EXPECT_GT(buffer.spans()[2].end_ns, 0u);
}

TEST(TraceBuffer, WithoutCapacityItIsOff) {
  TraceBuffer buffer;
  EXPECT_FALSE(buffer.enabled());
  buffer.end(0, 0x7FFFFFFF);
  EXPECT_TRUE(buffer.spans().empty());
  EXPECT_EQ(buffer.dropped(), 0u);
}

}  // namespace
}  // namespace efa_ep
