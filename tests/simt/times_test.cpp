// What the kernels say of time. CudaRank::check() compares samples with rounds, and waits with halves, after
// every test; here a rank comes late.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "cuda_world.h"
#include "engine/simt.h"
#include "small_world.h"

namespace efa_ep {
namespace {

constexpr uint32_t kLateRank = 1;
constexpr std::chrono::milliseconds kLate{20};
constexpr uint32_t kRounds = 8;

/// Queues a send and the receive that follows on all ranks, on one of them when the others have sent, and
/// some time later.
void exchange(CudaWorld& world, Half send, const std::vector<RankRound>& round,
              std::chrono::milliseconds late) {
  std::atomic<uint32_t> sent{0};
  const auto queue = [&](uint32_t rank) {
    world.rank(rank).queue(send, 0, round[rank]);
    world.rank(rank).then(0, [&sent] { ++sent; });
    world.rank(rank).queue(static_cast<Half>(static_cast<uint32_t>(send) + 1), 0, round[rank]);
  };
  for (uint32_t rank = 0; rank < round.size(); ++rank) {
    if (rank != kLateRank) queue(rank);
  }
  while (sent + 1 < round.size()) std::this_thread::yield();
  std::this_thread::sleep_for(late);  // the slowness that is measured
  queue(kLateRank);
  for (uint32_t rank = 0; rank < round.size(); ++rank) world.rank(rank).sync();
}

class Times : public testing::TestWithParam<std::pair<uint32_t, uint32_t>> {};

TEST_P(Times, OfALateRankCountOnceAndForIt) {
  const auto [nodes, ranks_per_node] = GetParam();
  const WorldConfig config = small_config(nodes, ranks_per_node);
  CudaRank::Options options;
  options.num_sms = 1;  // GPUs start the first block first, and it notes the time; the engine starts any
  CudaWorld world(config, options);
  Planner planner(config);
  const uint64_t start = simt::global_timer();
  for (uint32_t number = 1; number <= kRounds; ++number) {
    const std::vector<RankRound> round = planner.plan();
    const auto late = number == 1 ? kLate : std::chrono::milliseconds(0);
    exchange(world, Half::kDispatchSend, round, late);
    exchange(world, Half::kCombineSend, round, late);
    for (uint32_t rank = 0; rank < config.world(); ++rank) world.rank(rank).check();
  }
  const uint64_t elapsed = simt::global_timer() - start;
  for (uint32_t rank = 0; rank < config.world(); ++rank) {
    uint64_t halves = 0;  // which follow one another
    for (const auto& half : world.rank(rank).times(0).halves) halves += half.total_ns;
    EXPECT_LE(halves, elapsed) << "rank " << rank;
  }
  const cuda::ChannelTimes& times = world.rank(0).times(0);
  // The engine's clock is at least a quarter as fast as the world's.
  const uint64_t least = std::chrono::nanoseconds(kLate).count() / 4;
  EXPECT_GE(times.waits[static_cast<size_t>(Half::kDispatchRecv)].total_ns, least);
  EXPECT_GE(times.waits[static_cast<size_t>(Half::kCombineRecv)].total_ns, least);
  EXPECT_GE(times.waited_for_ns[kLateRank], 2 * least);
}

INSTANTIATE_TEST_SUITE_P(Worlds, Times, testing::Values(std::pair(1, 2), std::pair(2, 1), std::pair(2, 2)));

}  // namespace
}  // namespace efa_ep
