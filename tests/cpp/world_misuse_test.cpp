// Calls that cannot work: refused before anything is sent, and the instance stays usable.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "small_world.h"

namespace efa_ep {
namespace {

class Misuse : public testing::Test {
 protected:
  /// Two nodes: what is sent shows in the proxy's counters, too.
  const WorldConfig config_ = small_config(2, 1);
  World world_{config_};
  Planner planner_{config_};

  void expect_refused(const std::function<void()>& call, const std::string& explanation) {
    const DeviceCounters before = world_.device(0).counters();
    try {
      call();
      ADD_FAILURE() << "expected: " << explanation;
    } catch (const ConfigurationError& error) {
      EXPECT_NE(std::string(error.what()).find(explanation), std::string::npos) << error.what();
    }
    const DeviceCounters after = world_.device(0).counters();
    EXPECT_EQ(after.rounds, before.rounds);
    EXPECT_EQ(after.tokens, before.tokens);
    EXPECT_EQ(after.network_rows, before.network_rows);
    EXPECT_EQ(after.peer_rows, before.peer_rows);
  }
  template <class Id>
  void expect_id_refused(Id id) {
    const std::vector<std::byte> x(kMaxTokens * 16);
    const std::vector<float> weights(kMaxTokens * kTopK, 1.0f);
    std::vector<Id> ids(kMaxTokens * kTopK, 0);
    ids[2 * kTopK + 1] = id;
    expect_refused(
        [&] {
          world_.device(0).dispatch_send(0, {.x = x.data(),
                                             .ids = ids.data(),
                                             .ids_are_64_bit = sizeof(Id) == 8,
                                             .weights = weights.data(),
                                             .tokens = kMaxTokens});
        },
        "topk_ids[2, 1] is " + std::to_string(id));
  }
  void expect_usable() {
    for (uint32_t i = 0; i < 3; ++i) run_round(world_, {0, 1}, planner_.plan());
  }
};

TEST_F(Misuse, IdsOutOfRange) {
  for (const int32_t id : {2, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    expect_id_refused<int32_t>(id);
    expect_id_refused<int64_t>(id);
  }
  for (const int64_t id :
       {int64_t{1} << 32, -(int64_t{1} << 32), (int64_t{1} << 32) + 1, (int64_t{1} << 32) - 1,
        std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()}) {
    expect_id_refused<int64_t>(id);
  }
  EXPECT_EQ(world_.proxy(0)->counters().writes, 0u);
  EXPECT_EQ(world_.network().traffic(0).writes, 0u);
  expect_usable();
}

TEST_F(Misuse, TooManyTokens) {
  const DispatchInput input{.tokens = kMaxTokens + 1};
  expect_refused([&] { world_.device(0).dispatch_send(0, input); }, "5 tokens to dispatch");
  expect_usable();
}

TEST_F(Misuse, AChannelThatDoesNotExist) {
  CpuDevice& device = world_.device(0);
  for (const uint32_t channel : {1u, 2u, 0xFFFFFFFFu}) {
    const std::string text = "channel " + std::to_string(channel);
    expect_refused([&] { device.dispatch_send(channel, {}); }, text);
    expect_refused([&] { device.dispatch_wait(channel); }, text);
    expect_refused([&] { device.dispatch_pack(channel, {}); }, text);
    expect_refused([&] { device.combine_send(channel, {}); }, text);
    expect_refused([&] { device.combine_recv(channel, nullptr); }, text);
  }
  expect_usable();
}

// At every point of a round, all calls but the next one are refused, and change nothing.
TEST_F(Misuse, CallsOutOfTurn) {
  CpuDevice& device = world_.device(0);
  const std::vector<std::pair<std::string, std::function<void()>>> calls = {
      {"dispatch_send", [&] { device.dispatch_send(0, {}); }},
      {"dispatch_recv", [&] { device.dispatch_wait(0); }},
      {"combine_send", [&] { device.combine_send(0, {}); }},
      {"combine_recv", [&] { device.combine_recv(0, nullptr); }}};
  for (uint32_t i = 0; i < 3; ++i) {
    const std::vector<RankRound> round = planner_.plan();
    for (uint32_t half = 0; half < 4; ++half) {
      for (uint32_t call = 0; call < 4; ++call) {
        if (call != half) expect_refused(calls[call].second, calls[call].first + " came out of turn");
      }
      expect_refused([&] { device.dispatch_pack(0, {}); }, "dispatch_recv came out of turn");
      run_half(world_, static_cast<Half>(half), {0, 1}, round);
    }
  }
}

TEST(MisusePerExpert, RowsPerSlotAreRefused) {
  WorldConfig config = small_config(1, 1);
  config.per_expert = true;
  World world(config);
  Planner planner(config);
  const std::vector<RankRound> round = planner.plan();
  run_half(world, Half::kDispatchSend, {0}, round);
  run_half(world, Half::kDispatchRecv, {0}, round);
  EXPECT_THROW(world.device(0).combine_send(0, {.per_slot = true}), ConfigurationError);
}

TEST_F(Misuse, OfTheConstructor) {
  CpuDeviceOptions options;
  options.layout = config_.layout;
  options.expert_owner = {0, 1};
  const std::vector<std::byte*> arenas = {world_.arena(0)};
  EXPECT_NO_THROW(CpuDevice(options, arenas, world_.proxy(0)));
  EXPECT_THROW(CpuDevice(options, {}, world_.proxy(0)), ConfigurationError);
  EXPECT_THROW(CpuDevice(options, arenas, nullptr), ConfigurationError);
  options.expert_owner = {0, 1, 2};
  try {
    CpuDevice(options, arenas, world_.proxy(0));
    FAIL();
  } catch (const ConfigurationError& error) {
    EXPECT_NE(std::string(error.what()).find("expert 2 is placed on rank 2"), std::string::npos);
  }
}

}  // namespace
}  // namespace efa_ep
