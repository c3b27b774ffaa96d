// Ranks that are missing, networks that fail, and writers that do not belong here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "errors.h"
#include "small_world.h"

namespace efa_ep {
namespace {

/// Runs a half that must end with its deadline.
void expect_timeout(World& world, Half half, uint32_t rank, const std::vector<RankRound>& round,
                    const std::vector<uint32_t>& missing, uint32_t number) {
  const testing::ScopedTrace trace(__FILE__, __LINE__,
                                   testing::Message() << "rank " << rank << " of " << world.config());
  try {
    world.run(half, rank, 0, round[rank]);
    ADD_FAILURE() << "missed nobody";
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.half, kHalfNames[static_cast<size_t>(half)]);
    EXPECT_EQ(error.round, number);
    EXPECT_EQ(error.missing, missing) << error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
}

/// Whom `rank` has to name when it waits in vain because of `lost`.
using Blame = std::function<uint32_t(const Topology&, uint32_t rank, uint32_t lost)>;

/// In round 2, the last rank does everything before `half` but its send, and then nothing; the others get to
/// `half` and must name whom they wait for.
void lose_a_rank(Half half, const Blame& blame, uint32_t nodes, uint32_t ranks_per_node) {
  WorldConfig config = small_config(nodes, ranks_per_node);
  config.proxy_threads = true;
  World world(config, std::chrono::seconds(4));  // for the others to do their part
  Planner planner(config);
  const uint32_t lost = config.world() - 1;
  const std::vector<uint32_t> everybody = all_ranks(config);
  const std::vector<uint32_t> others(everybody.begin(), everybody.end() - 1);
  run_round(world, everybody, planner.plan());
  const std::vector<RankRound> round = planner.plan();
  const auto last = static_cast<uint32_t>(half) - 1;
  for (uint32_t earlier = 0; earlier < last; ++earlier) {
    run_half(world, static_cast<Half>(earlier), everybody, round);
  }
  run_half(world, static_cast<Half>(last), others, round);
  std::vector<std::thread> threads;
  for (const uint32_t rank : others) {
    const std::vector<uint32_t> missing = {blame(config.layout.topology, rank, lost)};
    threads.emplace_back([&, rank, missing] { expect_timeout(world, half, rank, round, missing, 2); });
  }
  for (std::thread& thread : threads) thread.join();
}

/// All shapes at once, since all they do is wait.
void lose_a_rank_in_every_shape(Half half, const Blame& blame) {
  std::vector<std::thread> threads;
  for (const auto& [nodes, ranks_per_node] :
       std::vector<std::pair<uint32_t, uint32_t>>{{1, 2}, {1, 4}, {3, 1}, {2, 2}, {2, 3}}) {
    threads.emplace_back([&, nodes = nodes, ranks_per_node = ranks_per_node] {
      lose_a_rank(half, blame, nodes, ranks_per_node);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A lost rank's rows come to its own node from itself, to its rail peers over the network, and to all others
// through the rank of their node that shares its rail.
TEST(MissingRank, IsNamedByDispatchRecv) {
  lose_a_rank_in_every_shape(Half::kDispatchRecv, [](const Topology& topology, uint32_t rank, uint32_t lost) {
    if (topology.index_of(rank) == topology.index_of(lost)) return lost;
    return topology.rail_peer(lost, topology.node_of(rank));
  });
}

// A lost rank's partials are missed by its own node; other nodes miss that node's sums, which each of its
// ranks sends along its rail.
TEST(MissingRank, IsNamedByCombineRecv) {
  lose_a_rank_in_every_shape(Half::kCombineRecv, [](const Topology& topology, uint32_t rank, uint32_t lost) {
    if (topology.node_of(rank) == topology.node_of(lost)) return lost;
    return topology.rail_peer(rank, topology.node_of(lost));
  });
}

// The half after which rows may be overwritten waits for the writes that carry them: combine_recv for those
// of dispatch, and the next dispatch_recv for those of combine.
class SlowNetwork : public testing::TestWithParam<Operation> {};

INSTANTIATE_TEST_SUITE_P(Operations, SlowNetwork, testing::Values(Operation::kDispatch, Operation::kCombine));

TEST_P(SlowNetwork, AWriteThatDoesNotCompleteIsNamed) {
  const bool dispatch = GetParam() == Operation::kDispatch;
  const WorldConfig config = small_config(4, 1);
  World world(config, std::chrono::seconds(1));
  Planner planner(config);
  world.network().set_rule([](uint32_t source, const WriteRequest& request) {
    const bool chosen = Immediate::decode(request.immediate).operation == GetParam();
    return source == 0 && request.peer == 2 && chosen ? LoopbackNetwork::Fault::kNeverComplete
                                                      : LoopbackNetwork::Fault::kNone;
  });
  std::vector<RankRound> round = planner.plan();
  const uint32_t before = dispatch ? 3 : 4;
  for (uint32_t half = 0; half < before; ++half) {
    run_half(world, static_cast<Half>(half), all_ranks(config), round);
  }
  if (!dispatch) {
    round = planner.plan();
    run_half(world, Half::kDispatchSend, all_ranks(config), round);
  }
  const Half half = dispatch ? Half::kCombineRecv : Half::kDispatchRecv;
  std::thread others([&] { run_half(world, half, {1, 2, 3}, round); });
  expect_timeout(world, half, 0, round, {2}, dispatch ? 1 : 2);
  others.join();
}

// The completion words are all that a device needs: it neither helps nor locks before its rows are
// overwritten, which the network has just let go of.
TEST(Staging, IsFreeWhenTheCompletionWordsSaySo) {
  WorldConfig config = small_config(2, 1);
  config.proxy_threads = true;
  World world(config);
  Planner planner(config);
  for (uint32_t i = 0; i < 10; ++i) {
    const std::vector<RankRound> round = planner.plan();
    world.network().hold_completions(true);
    for (uint32_t half = 0; half < 3; ++half) run_half(world, static_cast<Half>(half), {0, 1}, round);
    world.network().hold_completions(false);
    const Patience patience;
    for (const uint32_t rank : {0u, 1u}) {
      while (world.proxy(rank)->counters().completions < world.proxy(rank)->counters().writes)
        patience.check();
    }
    run_half(world, Half::kCombineRecv, {0, 1}, round);
  }
}

TEST(TransportFailure, EndsAWaitAndEveryLaterCall) {
  const WorldConfig config = small_config(2, 1);
  World world(config);
  Planner planner(config);
  world.network().set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
  const std::vector<RankRound> round = planner.plan();
  world.run(Half::kDispatchSend, 0, 0, round[0]);
  EXPECT_THROW(world.run(Half::kDispatchRecv, 0, 0, round[0]), TransportError);
  EXPECT_THROW(world.device(0).dispatch_wait(0), TransportError);
}

TEST(Interrupt, EndsAWaitWithTheCallersOwnError) {
  struct Interrupted {
    std::string half;
    uint32_t round;
    std::string wait;
  };
  const WorldConfig config = small_config(1, 2);
  World world(config);
  CpuDeviceOptions options;
  options.layout = config.layout;
  options.expert_owner = config.expert_owner;
  options.check_interrupt = [](const Wait& wait) {
    throw Interrupted{wait.half, wait.round, wait.describe()};
  };
  CpuDevice device(options, {world.arena(0), world.arena(1)}, nullptr);
  device.dispatch_send(0, {});
  try {
    device.dispatch_wait(0);
    FAIL();
  } catch (const Interrupted& interrupted) {
    EXPECT_EQ(interrupted.half, "dispatch_recv");
    EXPECT_EQ(interrupted.round, 1u);
    EXPECT_EQ(interrupted.wait.find("dispatch_recv of round 1 on rank 0 waited"), 0u) << interrupted.wait;
    EXPECT_NE(interrupted.wait.find("for rank 1"), std::string::npos) << interrupted.wait;
  }
}

/// A world of two local ranks without tokens. Rank 0's combine_recv has nothing to wait for but rank 1's
/// combine_send, which the test does between two looks of rank 0's: its device has the test's options.
class BetweenTwoLooks : public testing::Test {
 protected:
  /// Runs rank 0 up to its combine_recv and returns its device.
  std::unique_ptr<CpuDevice> combine_sent(CpuDeviceOptions options) {
    options.layout = config_.layout;
    options.expert_owner = config_.expert_owner;
    auto device =
        std::make_unique<CpuDevice>(options, std::vector{world_.arena(0), world_.arena(1)}, nullptr);
    for (CpuDevice* rank : {device.get(), &world_.device(1)}) rank->dispatch_send(0, {});
    for (CpuDevice* rank : {device.get(), &world_.device(1)}) {
      int32_t tokens_per_expert = 0;
      EXPECT_EQ(rank->dispatch_wait(0), 0u);
      rank->dispatch_pack(0, {.tokens_per_expert = &tokens_per_expert});
    }
    device->combine_send(0, {.rows = device->results(0)});
    return device;
  }
  void send_from_rank_1() {
    if (!std::exchange(sent_, true)) world_.device(1).combine_send(0, {.rows = world_.device(1).results(0)});
  }

 private:
  const WorldConfig config_ = small_config(1, 2);
  World world_{config_};
  bool sent_ = false;
};

TEST_F(BetweenTwoLooks, AWaitThatIsOverNamesNobody) {
  std::vector<std::string> waits;
  CpuDeviceOptions options;
  options.check_interrupt = [&](const Wait& wait) {
    send_from_rank_1();
    waits.push_back(wait.describe());
  };
  combine_sent(options)->combine_recv(0, nullptr);
  ASSERT_FALSE(waits.empty());
  EXPECT_TRUE(waits.front().ends_with(" for nobody")) << waits.front();
}

TEST_F(BetweenTwoLooks, WhatComesAtTheDeadlineIsInTime) {
  struct Clock final : DeadlineClock {
    TimePoint now() const override {
      if (calls++ == 0) return {};
      at_deadline();
      return TimePoint(std::chrono::hours(1));
    }
    std::function<void()> at_deadline;
    mutable int calls = 0;
  } clock;
  clock.at_deadline = [this] { send_from_rank_1(); };
  CpuDeviceOptions options;
  options.timeout = std::chrono::seconds(1);
  options.clock = &clock;
  const std::unique_ptr<CpuDevice> device = combine_sent(options);
  EXPECT_EQ(clock.calls, 0);
  device->combine_recv(0, nullptr);
  EXPECT_GT(clock.calls, 1);
}

/// A dispatch row that names one expert.
Bytes row_naming(const Layout& layout, int32_t id) {
  Bytes row(layout.dispatch_row());
  const std::vector<int32_t> ids = {0, id};
  std::memcpy(row.data() + RowShape::ids_offset(), ids.data(), sizeof(int32_t) * ids.size());
  return row;
}

RankRound nothing() { return {}; }
RankRound nothing_of_one_expert() {
  RankRound round;
  round.tokens_per_expert = {0};
  return round;
}

// Node 1 is played by the test: its slot holds a row that no rank of this run can have written.
TEST(ForeignRow, InASlotIsAProtocolError) {
  for (const uint32_t ranks_per_node : {1u, 2u}) {
    for (const int32_t id : {99, std::numeric_limits<int32_t>::max()}) {
      const WorldConfig config = small_config(2, ranks_per_node);
      World world(config);
      const Bytes row = row_naming(config.layout, id);
      const uint32_t writer = ranks_per_node;  // index 0 of node 1
      const size_t staging = config.layout.outgoing(0, Operation::kDispatch);
      std::copy(row.begin(), row.end(), world.arena(writer) + staging);
      const Immediate immediate{.round_tag = 1, .source_node = 1, .first = true, .value = 1};
      ASSERT_EQ(world.network().endpoint(writer).post_write(
                    {.peer = 0,
                     .local_offset = staging,
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

// Node 1 is played by the test, and what it wrote changes after this node's ranks have listed it: the results
// of the row's owners would be summed into other tokens.
TEST(ForeignRow, ThatChangesAfterItsArrivalIsAProtocolError) {
  const WorldConfig config = small_config(2, 2);
  for (const std::vector<int32_t>& later : {std::vector{0, -1}, {1, 1}, {0, 2}}) {
    World world(config);
    const size_t slot = config.layout.slot(0, Operation::kDispatch, 0, 1);
    const Bytes row = row_naming(config.layout, 1);  // and expert 0: one expert on each rank
    std::copy(row.begin(), row.end(), world.arena(0) + slot);
    for (const uint32_t rank : {0u, 1u}) {
      const uint32_t rows = rank == 0 ? 1 : 0;
      const Immediate immediate{.round_tag = 1, .source_node = 1, .first = true, .value = rows};
      ASSERT_EQ(
          world.network().endpoint(2 + rank).post_write({.peer = rank, .immediate = immediate.encode()}),
          PostResult::kPosted);
      world.dispatch_send(rank, 0, nothing());
    }
    std::thread other([&] { world.device(1).dispatch_wait(0); });
    EXPECT_EQ(world.device(0).dispatch_wait(0), 1u);
    other.join();
    for (const uint32_t rank : {1u, 0u}) {
      Bytes x(16);
      std::vector<int32_t> ids(kTopK);
      std::vector<float> weights(kTopK);
      int32_t tokens_per_expert = 0;
      world.device(rank).dispatch_pack(0, {.x = x.data(),
                                           .ids = ids.data(),
                                           .weights = weights.data(),
                                           .tokens_per_expert = &tokens_per_expert});
      EXPECT_EQ(tokens_per_expert, 1);
    }
    world.device(1).combine_send(0, {.rows = world.device(1).results(0)});
    std::memcpy(world.arena(0) + slot + RowShape::ids_offset(), later.data(), sizeof(int32_t) * later.size());
    try {
      world.device(0).combine_send(0, {.rows = world.device(0).results(0)});
      ADD_FAILURE();
    } catch (const ProtocolError& error) {
      EXPECT_NE(std::string(error.what()).find("rows of rank 2 changed"), std::string::npos) << error.what();
    }
  }
}

// Rank 1, played by the test, answers for a token that it never got: the sums of an earlier round must not
// pass for this round's.
TEST(ForeignSums, ForOtherTokensAreAProtocolError) {
  World world(small_config(2, 1));
  world.dispatch_send(0, 0, nothing());
  for (const auto& [operation, rows] : {std::pair{Operation::kDispatch, 0U}, {Operation::kCombine, 1U}}) {
    const Immediate immediate{
        .round_tag = 1, .operation = operation, .source_node = 1, .first = true, .value = rows};
    ASSERT_EQ(world.network().endpoint(1).post_write({.peer = 0, .immediate = immediate.encode()}),
              PostResult::kPosted);
  }
  world.dispatch_recv(0, 0, nothing_of_one_expert());
  world.combine_send(0, 0, nothing());
  try {
    world.device(0).combine_recv(0, nullptr);
    ADD_FAILURE();
  } catch (const ProtocolError& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1 announced results for 1 tokens, but 0"),
              std::string::npos)
        << error.what();
  }
}

/// A world of two local ranks of which rank 1 is played by the test.
class ForeignPeer : public testing::TestWithParam<bool> {
 protected:
  ForeignPeer() {
    config_.per_expert = GetParam();
    world_.emplace(config_);
    world_->dispatch_send(0, 0, nothing());
  }
  void announce(RoundWord word, uint32_t listed_row = 0) {
    const Layout& layout = config_.layout;
    std::memcpy(world_->arena(1) + layout.outgoing(0, Operation::kDispatch), row_.data(), row_.size());
    std::memcpy(world_->arena(1) + layout.row_list(0, 0, 0), &listed_row, sizeof listed_row);
    const uint64_t bits = word.encode();
    std::memcpy(world_->arena(0) + layout.dispatch_flag(0, layout.block(0, 0, 1)), &bits, sizeof bits);
  }
  WorldConfig config_ = small_config(1, 2);
  Bytes row_ = row_naming(config_.layout, 2);
  std::optional<World> world_;
};

INSTANTIATE_TEST_SUITE_P(Layouts, ForeignPeer, testing::Bool());

TEST_P(ForeignPeer, ARowThatNamesAnUnknownExpertIsAProtocolError) {
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

TEST_P(ForeignPeer, ARowOutsideOfTheStagingIsAProtocolError) {
  announce({.round = 1, .rows = 1}, kMaxTokens);
  EXPECT_THROW(world_->device(0).dispatch_wait(0), ProtocolError);
}

TEST_P(ForeignPeer, MoreRowsThanTokensIsAProtocolError) {
  announce({.round = 1, .rows = kMaxTokens + 1});
  EXPECT_THROW(world_->device(0).dispatch_wait(0), ProtocolError);
}

}  // namespace
}  // namespace efa_ep
