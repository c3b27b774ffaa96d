// Positions of lost ranks: a stand-in keeps its rail and its node whole, and slots of experts that nobody has
// are dropped and counted.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <vector>

#include "cpu/stand_in.h"
#include "errors.h"
#include "small_world.h"

namespace efa_ep {
namespace {

constexpr uint32_t kLost = 2;

CpuDeviceOptions options_of(const WorldConfig& config, std::chrono::nanoseconds timeout) {
  CpuDeviceOptions options;
  options.layout = config.layout;
  options.rank = kLost;
  options.expert_owner = config.expert_owner;
  options.combine_type = config.combine_type;
  options.timeout = timeout;
  return options;
}

/// 2 nodes of 2 ranks, of which kLost is gone and another rank has its expert.
struct LossyWorld {
  explicit LossyWorld(uint32_t channels = 1, std::chrono::nanoseconds timeout = kPatience)
      : config(lossy_config(channels)),
        world(config),
        stand_in(options_of(config, timeout), {world.arena(2), world.arena(3)}, world.proxy(kLost)) {}

  static WorldConfig lossy_config(uint32_t channels) {
    WorldConfig config = small_config(2, 2);
    config.layout.channels = channels;
    config.proxy_threads = true;  // the stand-in may need what the others have not got to in their last half
    config.expert_owner[kLost] = 0;
    return config;
  }

  /// A round in which the lost rank happens to have no tokens.
  std::vector<RankRound> plan() {
    while (true) {
      std::vector<RankRound> round = planner.plan();
      if (round[kLost].tokens == 0) return round;
    }
  }

  const WorldConfig config;
  World world;
  StandIn stand_in;
  Planner planner{config};
};

TEST(StandIn, KeepsTheRoundsOfTheOthersRight) {
  LossyWorld lossy;
  for (uint32_t round = 0; round < 50; ++round) {
    lossy.stand_in.start_round(0);
    run_round(lossy.world, {0, 1, 3}, lossy.plan());
  }
  EXPECT_TRUE(lossy.stand_in.wait_until_idle(kPatience));
  EXPECT_NO_THROW(lossy.stand_in.throw_if_failed());
}

TEST(StandIn, ServesItsChannelsIndependently) {
  LossyWorld lossy(2);
  const std::array plans = {lossy.plan(), lossy.plan()};
  lossy.stand_in.start_round(1);
  lossy.stand_in.start_round(0);
  const std::vector<uint32_t> live = {0, 1, 3};
  for (const uint32_t channel : {0U, 1U}) {
    for (uint32_t half = 0; half < 4; ++half) {
      std::vector<std::thread> threads;
      for (const uint32_t rank : live) {
        threads.emplace_back(
            [&, rank] { lossy.world.run(static_cast<Half>(half), rank, channel, plans[channel][rank]); });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
  EXPECT_TRUE(lossy.stand_in.wait_until_idle(kPatience));
}

TEST(StandIn, RestsUntilARoundBegins) {
  LossyWorld lossy(1, std::chrono::nanoseconds::zero());  // with a deadline that any wait would exceed
  EXPECT_TRUE(lossy.stand_in.wait_until_idle(std::chrono::nanoseconds::zero()));
  EXPECT_NO_THROW(lossy.stand_in.throw_if_failed());
}

TEST(StandIn, StopsInsideARound) {
  LossyWorld lossy;
  lossy.stand_in.start_round(0);  // which nobody else begins
  EXPECT_FALSE(lossy.stand_in.wait_until_idle(std::chrono::nanoseconds::zero()));
  lossy.stand_in.stop();
  lossy.stand_in.stop();
  EXPECT_NO_THROW(lossy.stand_in.throw_if_failed());
}

TEST(StandIn, HandsItsErrorToTheRankThatServesIt) {
  LossyWorld lossy(1, std::chrono::milliseconds(1));
  lossy.stand_in.start_round(0);
  try {
    lossy.stand_in.wait_until_idle(kPatience);
    FAIL() << "the round ended without the other ranks";
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.half, "dispatch_recv");
    EXPECT_EQ(error.missing, (std::vector<uint32_t>{0, 3}));
  }
  EXPECT_THROW(lossy.stand_in.throw_if_failed(), RankTimeoutError);
}

TEST(Placement, SlotsOfExpertsWithoutOwnerAreDroppedAndCounted) {
  WorldConfig config = small_config(1, 2);
  config.expert_owner = {0, kNoOwner, 1, kNoOwner};
  World world(config);
  // Token 0 keeps one slot of two, token 1 none, token 2 dropped one itself.
  const std::vector<int32_t> ids = {1, 2, 3, 1, -1, 0};
  const std::vector<float> weights = {0.5f, 1.0f, 0.25f, 2.0f, 8.0f, 1.0f};
  const Bytes x(3 * 16);
  const DispatchInput none{};
  world.device(0).dispatch_send(
      0, {.x = x.data(), .x_stride = 16, .ids = ids.data(), .weights = weights.data(), .tokens = 3});
  world.device(1).dispatch_send(0, none);
  ASSERT_EQ(world.device(1).dispatch_wait(0), 1U);
  Bytes rows(16);
  std::vector<int32_t> received(2);
  std::vector<float> received_weights(2);
  int32_t tokens_per_expert = 0;
  world.device(1).dispatch_pack(0, {.x = rows.data(),
                                    .ids = received.data(),
                                    .weights = received_weights.data(),
                                    .tokens_per_expert = &tokens_per_expert});
  EXPECT_EQ(received, (std::vector<int32_t>{-1, 2}));
  EXPECT_EQ(received_weights, (std::vector<float>{0.5f, 1.0f}));
  EXPECT_EQ(tokens_per_expert, 1);
  EXPECT_EQ(world.device(0).counters().dropped_slots, 3U);
  EXPECT_EQ(world.device(0).counters().dropped_weight, 2.75);
  EXPECT_EQ(world.device(1).counters().dropped_slots, 0U);
}

}  // namespace
}  // namespace efa_ep
