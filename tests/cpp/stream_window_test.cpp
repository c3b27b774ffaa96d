// The bytes under way to a peer that is reached through a stream: bounded, whatever the peer does, and never
// stuck.
#include "fabric/stream_window.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <random>

#include "fabric_suite.h"
#include "libfabric_testing.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

using testing::FabricCluster;
using testing::make_fabric;

constexpr uint64_t kWindow = StreamWindow::kWindowBytes;

TEST(StreamWindow, KeepsToItsBytesAndAlwaysGoesOn) {
  std::mt19937_64 random(test_seed(1));
  SCOPED_TRACE("TEST_SEED=" + std::to_string(test_seed(1)));
  for (int run = 0; run < 50; ++run) {
    StreamWindow window;
    struct Write {
      uint64_t bytes, covered;
    };
    std::deque<Write> in_order;  // what the peer has not acknowledged
    uint64_t unacknowledged = 0;
    const uint64_t longest = uint64_t{1} << (4 + random() % 20);
    for (int step = 0; step < 2000; ++step) {
      const uint64_t bytes = random() % (longest + 1);
      if (window.is_full(bytes)) {
        const bool one_is_to_come =
            std::ranges::any_of(in_order, [](const Write& write) { return write.covered > 0; });
        ASSERT_TRUE(one_is_to_come) << "nothing will ever open the window";
      } else {
        const uint64_t covered = window.covered_by(bytes);
        window.posted(bytes, covered);
        in_order.push_back({bytes, covered});
        unacknowledged += bytes;
        ASSERT_LE(unacknowledged, kWindow + longest);
      }
      // The peer takes the stream up to an acknowledgement, which is one for all that came before it.
      if (random() % 4 > 0) continue;
      const auto end = std::ranges::find_if(in_order, [](const Write& write) { return write.covered > 0; });
      if (end == in_order.end()) continue;
      uint64_t taken = 0;
      for (auto write = in_order.begin(); write <= end; ++write) taken += write->bytes;
      ASSERT_EQ(end->covered, taken);
      window.completed(end->covered);
      unacknowledged -= taken;
      in_order.erase(in_order.begin(), end + 1);
    }
  }
}

TEST(StreamWindow, LittleTrafficAsksForNoAcknowledgement) {
  StreamWindow window;
  EXPECT_EQ(window.covered_by(kWindow / 2 - 1), 0U);
  EXPECT_EQ(window.covered_by(kWindow / 2), kWindow / 2);
}

TEST(StreamWindow, APeerOverTcpThatDoesNotPollGetsNoMore) {
  constexpr uint32_t kBytes = 128 << 10;
  FabricCluster cluster(2, kBytes, [](uint32_t) { return make_fabric("tcp"); });
  ASSERT_GT(uint64_t{cluster.fabric(0).description().send_queue_depth} * kBytes, 2 * kWindow);
  WriteRequest request;
  request.peer = 1;
  uint64_t arrived = 0;
  const auto count = [&](uint32_t, const Completion& completion) {
    ASSERT_NE(completion.kind, CompletionKind::kError) << completion.error;
    if (completion.kind == CompletionKind::kArrival) ++arrived;
  };
  cluster.write(0, request, count);  // TCP answers "again" until it is connected
  cluster.poll_until([&] { return arrived == 1; }, count);

  request.bytes = kBytes;
  for (uint32_t round = 0; round < 3; ++round) {
    arrived = 0;
    uint64_t posted = 0;
    std::array<Completion, 16> completions;
    for (uint32_t attempt = 0; attempt < 10'000; ++attempt) {
      if (cluster.fabric(0).post_write(request) == PostResult::kPosted) ++posted;
      const size_t own = cluster.fabric(0).poll(completions);
      for (size_t i = 0; i < own; ++i) count(0, completions[i]);
    }
    EXPECT_GE(posted * kBytes, kWindow / 2);
    EXPECT_LE(posted * kBytes, kWindow);
    cluster.poll_until([&] { return arrived == posted; }, count);
  }
}

}  // namespace
}  // namespace efa_ep
