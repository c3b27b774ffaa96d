// What the halves do when a caller, a rank or a writer misbehaves.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "test_environment.h"
#include "world.h"

namespace efa_ep {
namespace {

using std::chrono::milliseconds;

constexpr uint32_t kTopK = 2;
constexpr uint32_t kMaxTokens = 4;

WorldConfig config_of(uint32_t nodes, uint32_t ranks_per_node) {
  WorldConfig config;
  config.layout.topology = {nodes * ranks_per_node, ranks_per_node};
  config.layout.row = {.top_k = kTopK, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 16};
  config.layout.max_tokens = kMaxTokens;
  for (uint32_t rank = 0; rank < config.world(); ++rank) config.expert_owner.push_back(rank);
  config.routing = Routing::kUniform;
  config.proxy_threads = false;
  config.seed = test_seed(41);
  return config;
}

/// Runs one half on all the given ranks at the same time.
void run_half(World& world, Half half, const std::vector<uint32_t>& ranks,
              const std::vector<RankRound>& round) {
  std::vector<std::thread> threads;
  for (const uint32_t rank : ranks) {
    threads.emplace_back([&, rank] {
      try {
        world.run(half, rank, 0, round[rank]);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void run_round(World& world, const std::vector<uint32_t>& ranks, const std::vector<RankRound>& round) {
  for (uint32_t half = 0; half < 4; ++half) run_half(world, static_cast<Half>(half), ranks, round);
}

std::vector<uint32_t> all_ranks(const WorldConfig& config) {
  std::vector<uint32_t> ranks;
  for (uint32_t rank = 0; rank < config.world(); ++rank) ranks.push_back(rank);
  return ranks;
}

// --- misuse ----------------------------------------------------------------------------------------------

class Misuse : public testing::Test {
 protected:
  /// Two nodes: what is sent shows in the proxy's counters, too.
  const WorldConfig config_ = config_of(2, 1);
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

TEST_F(Misuse, OfTheConstructor) {
  CpuDeviceOptions options{.layout = config_.layout, .rank = 0, .expert_owner = {0, 1}};
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

// --- missing ranks ---------------------------------------------------------------------------------------

/// Runs a half that must end with its deadline.
void expect_timeout(World& world, Half half, uint32_t rank, const std::vector<RankRound>& round,
                    const std::vector<uint32_t>& missing, uint32_t number) {
  try {
    world.run(half, rank, 0, round[rank]);
    ADD_FAILURE() << "rank " << rank << " missed nobody";
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.half, kHalfNames[static_cast<size_t>(half)]);
    EXPECT_EQ(error.round, number);
    EXPECT_EQ(error.missing, missing) << "rank " << rank << ": " << error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "rank " << rank << ": " << error.what();
  }
}

class MissingRank : public testing::TestWithParam<std::pair<uint32_t, uint32_t>> {
 protected:
  // Others have to be quick enough to not be missed themselves.
  static constexpr milliseconds kTimeout{500};

  WorldConfig config() const {
    WorldConfig config = config_of(GetParam().first, GetParam().second);
    config.proxy_threads = true;
    return config;
  }
  /// In round 2, the last rank does everything before `half` and then nothing; the others get to `half`.
  void run(Half half, const std::function<uint32_t(const Topology&, uint32_t, uint32_t)>& blamed) {
    const WorldConfig config = this->config();
    SCOPED_TRACE(testing::Message() << config);
    World world(config, kTimeout);
    Planner planner(config);
    const Topology topology = config.layout.topology;
    const uint32_t lost = config.world() - 1;
    const std::vector<uint32_t> everybody = all_ranks(config);
    const std::vector<uint32_t> others(everybody.begin(), everybody.end() - 1);
    run_round(world, everybody, planner.plan());
    const std::vector<RankRound> round = planner.plan();
    for (uint32_t earlier = 0; earlier + 1 < static_cast<uint32_t>(half); ++earlier) {
      run_half(world, static_cast<Half>(earlier), everybody, round);
    }
    run_half(world, static_cast<Half>(static_cast<uint32_t>(half) - 1), others, round);
    std::vector<std::thread> threads;
    for (const uint32_t rank : others) {
      threads.emplace_back(
          [&, rank] { expect_timeout(world, half, rank, round, {blamed(topology, rank, lost)}, 2); });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

INSTANTIATE_TEST_SUITE_P(Shapes, MissingRank,
                         testing::Values(std::pair{1u, 2u}, std::pair{1u, 4u}, std::pair{3u, 1u},
                                         std::pair{2u, 2u}, std::pair{2u, 3u}));

// A lost rank's rows come to its own node from itself, to its rail peers over the network, and to all others
// through the rank of their node that shares its rail.
TEST_P(MissingRank, IsNamedByDispatchRecv) {
  run(Half::kDispatchRecv, [](const Topology& topology, uint32_t rank, uint32_t lost) {
    if (topology.index_of(rank) == topology.index_of(lost)) return lost;
    return topology.rail_peer(lost, topology.node_of(rank));
  });
}

// A lost rank's partials are missed by its own node; other nodes miss that node's sums, which each of its
// ranks sends along its rail.
TEST_P(MissingRank, IsNamedByCombineRecv) {
  run(Half::kCombineRecv, [](const Topology& topology, uint32_t rank, uint32_t lost) {
    if (topology.node_of(rank) == topology.node_of(lost)) return lost;
    return topology.rail_peer(rank, topology.node_of(lost));
  });
}

// Send halves wait for their own writes only: to overwrite their staging, and for room in the ring.
class SlowNetwork : public testing::TestWithParam<Operation> {};

INSTANTIATE_TEST_SUITE_P(Operations, SlowNetwork, testing::Values(Operation::kDispatch, Operation::kCombine));

TEST_P(SlowNetwork, AWriteThatDoesNotCompleteIsNamedByTheNextSend) {
  const WorldConfig config = config_of(4, 1);
  World world(config, milliseconds(200));
  Planner planner(config);
  world.network().set_rule([](uint32_t source, const WriteRequest& request) {
    const bool chosen = Immediate::decode(request.immediate).operation == GetParam();
    return source == 0 && request.peer == 2 && chosen ? LoopbackNetwork::Fault::kNeverComplete
                                                      : LoopbackNetwork::Fault::kNone;
  });
  run_round(world, all_ranks(config), planner.plan());
  const Patience patience;
  while (world.proxy(0)->unfinished_destinations() != std::vector<uint32_t>{2}) {
    world.proxy(0)->help();
    patience.check();
  }
  const std::vector<RankRound> round = planner.plan();
  if (GetParam() == Operation::kDispatch) {
    expect_timeout(world, Half::kDispatchSend, 0, round, {2}, 2);
  } else {
    run_half(world, Half::kDispatchSend, all_ranks(config), round);
    run_half(world, Half::kDispatchRecv, all_ranks(config), round);
    while (world.proxy(0)->unfinished_destinations() != std::vector<uint32_t>{2}) {
      world.proxy(0)->help();
      patience.check();
    }
    expect_timeout(world, Half::kCombineSend, 0, round, {2}, 2);
  }
}

TEST(TransportFailure, EndsAWaitAndEveryLaterCall) {
  const WorldConfig config = config_of(2, 1);
  World world(config);
  Planner planner(config);
  world.network().set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
  const std::vector<RankRound> round = planner.plan();
  world.run(Half::kDispatchSend, 0, 0, round[0]);
  EXPECT_THROW(world.run(Half::kDispatchRecv, 0, 0, round[0]), TransportError);
  EXPECT_THROW(world.device(0).dispatch_wait(0), TransportError);
}

// --- foreign writers -------------------------------------------------------------------------------------

/// A dispatch row that names one expert.
Bytes row_naming(const Layout& layout, int32_t id) {
  Bytes row(layout.dispatch_row());
  const std::vector<int32_t> ids = {0, id};
  std::memcpy(row.data() + RowShape::ids_offset(), ids.data(), sizeof(int32_t) * ids.size());
  return row;
}

RankRound nothing() { return {}; }

// Node 1 is played by the test: its slot holds a row that no rank of this run can have written.
TEST(ForeignRow, InASlotIsAProtocolError) {
  for (const uint32_t ranks_per_node : {1u, 2u}) {
    for (const int32_t id : {99, std::numeric_limits<int32_t>::max()}) {
      const WorldConfig config = config_of(2, ranks_per_node);
      World world(config);
      const Bytes row = row_naming(config.layout, id);
      const uint32_t writer = ranks_per_node;  // index 0 of node 1
      std::copy(row.begin(), row.end(),
                world.arena(writer) + config.layout.staging(0, Operation::kDispatch, 1, 0));
      const Immediate immediate{.round_tag = 1, .source_node = 1, .first = true, .value = 1};
      ASSERT_EQ(world.network().endpoint(writer).post_write(
                    {.peer = 0,
                     .local_offset = config.layout.staging(0, Operation::kDispatch, 1, 0),
                     .remote_offset = config.layout.slot(0, Operation::kDispatch, 0, 1),
                     .bytes = static_cast<uint32_t>(row.size()),
                     .immediate = immediate.encode()}),
                PostResult::kPosted);
      world.dispatch_send(0, 0, nothing());
      try {
        world.device(0).dispatch_wait(0);
        ADD_FAILURE();
      } catch (const ProtocolError& error) {
        EXPECT_NE(std::string(error.what()).find("expert " + std::to_string(id)), std::string::npos);
      }
    }
  }
}

/// A world of two local ranks of which rank 1 is played by the test.
class ForeignRegion : public testing::TestWithParam<bool> {
 protected:
  ForeignRegion() {
    config_.per_expert = GetParam();
    world_.emplace(config_);
    world_->dispatch_send(0, 0, nothing());
  }
  void announce(RoundWord word) {
    const size_t block = config_.layout.block(0, 0, 1);
    std::memcpy(world_->arena(0) + config_.layout.region(0, block), row_.data(), row_.size());
    const uint64_t bits = word.encode();
    std::memcpy(world_->arena(0) + config_.layout.region_flag(0, block), &bits, sizeof bits);
  }
  WorldConfig config_ = config_of(1, 2);
  Bytes row_ = row_naming(config_.layout, 2);
  std::optional<World> world_;
};

INSTANTIATE_TEST_SUITE_P(Layouts, ForeignRegion, testing::Bool());

TEST_P(ForeignRegion, ARowThatNamesAnUnknownExpertIsAProtocolError) {
  announce({.round = 1, .rows = 1});
  EXPECT_EQ(world_->device(0).dispatch_wait(0), 1u);
  Bytes x(16 * 2 * kMaxTokens);
  std::vector<int32_t> ids(kTopK * 2 * kMaxTokens);
  std::vector<float> weights(ids.size());
  int32_t tokens_per_expert = 0;
  EXPECT_THROW(world_->device(0).dispatch_pack(0, {.x = x.data(),
                                                   .ids = ids.data(),
                                                   .weights = weights.data(),
                                                   .tokens_per_expert = &tokens_per_expert}),
               ProtocolError);
}

TEST_P(ForeignRegion, MoreRowsThanTokensIsAProtocolError) {
  announce({.round = 1, .rows = kMaxTokens + 1});
  EXPECT_THROW(world_->device(0).dispatch_wait(0), ProtocolError);
}

}  // namespace
}  // namespace efa_ep
