// The CUDA halves on an emulated network: whatever order, losses and refusals it thinks of, outputs stay the
// plan's, bit for bit; and a fault ends in the right error of every rank that it concerns.
#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "emulated_cuda_world.h"
#include "errors.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

using namespace std::chrono_literals;

WorldConfig config_of(uint32_t nodes, uint32_t ranks_per_node, uint64_t seed) {
  WorldConfig config;
  config.layout.topology = {nodes * ranks_per_node, ranks_per_node};
  config.layout.row = {.top_k = 3, .payload_bytes = 48, .scale_bytes = 4, .combine_bytes = 32};
  config.layout.max_tokens = 20;
  config.layout.channels = 1 + seed % 2;
  for (uint32_t expert = 0; expert < 2 * config.world(); ++expert) {
    config.expert_owner.push_back(expert % config.world());
  }
  config.per_expert = seed % 3 == 0;
  config.weights_applied = !config.per_expert;
  config.in_place = seed % 4 < 2;
  config.chunk_bytes = 100;  // a row each
  config.proxy_threads = false;
  config.seed = seed;
  return config;
}

using Shape = std::tuple<uint32_t, uint32_t>;  // nodes, ranks per node

class OnEmulatedNetwork : public testing::TestWithParam<Shape> {};

TEST_P(OnEmulatedNetwork, OutputsAreThePlans) {
  const auto [nodes, ranks_per_node] = GetParam();
  if (kThreadSanitized && nodes > 2) GTEST_SKIP() << "more threads than ThreadSanitizer follows in a minute";
  uint64_t lost_pieces = 0;
  uint64_t refused = 0;
  for (uint32_t turn = 0; turn < amount(kSanitized ? 1 : 6, 60) && !HasFailure(); ++turn) {
    WorldConfig config =
        config_of(nodes, ranks_per_node, test_seed(300 * nodes + 30 * ranks_per_node) + turn);
    config.rounds = amount(kSanitized ? 2 : 4, 8);
    EmulatedProfile profile = emulated_profile(turn % 3 == 2 ? "p5en" : "hostile");
    profile.send_queue_depth = 1;  // full on any schedule
    const CudaRank::Options options{.num_sms = kSanitized ? 1u : 2u, .ring_capacity = 8u << turn % 4};
    EmulatedCudaWorld world(config, profile, options);
    world.run(plan_rounds(config));
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      EXPECT_TRUE(world.end(rank).finished) << "rank " << rank << " on " << profile.name;
      const EmulatedCounters counters = world.counters(rank);
      EXPECT_EQ(counters.changed_sources, 0u) << "rank " << rank << " reused rows that were on their way";
      EXPECT_EQ(counters.posted, counters.completed);
      lost_pieces += counters.lost_pieces;
      refused += counters.refused;
    }
  }
  // The network was as bad as it is meant to be.
  EXPECT_TRUE(kSanitized || lost_pieces > 0);
  EXPECT_TRUE(kSanitized || refused > 0);
}

INSTANTIATE_TEST_SUITE_P(Shapes, OnEmulatedNetwork,
                         testing::Values(Shape{2, 1}, Shape{4, 1}, Shape{2, 2}, Shape{3, 2}));

struct NamedFault {
  const char* name;
  Fault fault;
  bool survived;
};

const std::vector<NamedFault>& faults() {
  static const std::vector<NamedFault> kFaults = {
      {"ProcessDies", {.kind = FaultKind::kDie}, false},
      {"DiesSilently", {.kind = FaultKind::kDie, .after_death = AfterDeath::kSilent}, false},
      {"DiesAtItsNextWrite", {.kind = FaultKind::kDie, .at_post = 1}, false},
      {"DiesAndItsWritesComeLate", {.kind = FaultKind::kDie, .late_by = 20ms}, false},
      {"Freezes", {.kind = FaultKind::kFreeze}, false},
      {"AWriteFails", {.kind = FaultKind::kFailWrites}, false},
      {"PostsAreRefused", {.kind = FaultKind::kRefusePosts}, false},
      {"FreezesForAWhile", {.kind = FaultKind::kFreeze, .duration = 10ms}, true},
      {"PostsAreRefusedForAWhile", {.kind = FaultKind::kRefusePosts, .duration = 10ms}, true},
      {"Retransmissions", {.kind = FaultKind::kLosePieces, .writes = 20, .losses = 10}, true},
  };
  return kFaults;
}

class FaultOnDevice : public testing::TestWithParam<size_t> {
 protected:
  /// Notes whom a rank's error blames. Nothing but these two may come of a fault of the network.
  static void note_blame(uint32_t rank, const std::exception_ptr& error, std::vector<int64_t>& blamed) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const TransportError& failure) {
      blamed.push_back(failure.peer);
    } catch (const RankTimeoutError& failure) {
      EXPECT_FALSE(std::count(failure.missing.begin(), failure.missing.end(), rank)) << failure.what();
      blamed.insert(blamed.end(), failure.missing.begin(), failure.missing.end());
    } catch (const std::exception& failure) {
      ADD_FAILURE() << "rank " << rank << " ended in " << failure.what();
    }
  }
};

TEST_P(FaultOnDevice, EndsInSurvivalOrInANamedError) {
  if (kSanitized) GTEST_SKIP() << "kernels that a sanitizer slows down miss deadlines of their own accord";
  constexpr uint32_t kRounds = 3;
  constexpr uint32_t kStruckRound = 2;
  const NamedFault& fault = faults()[GetParam()];
  // Every fault meets every half in the long form, one of them otherwise.
  for (uint32_t turn = 0; turn < amount(1, 8) && !HasFailure(); ++turn) {
    const uint64_t seed = test_seed(700 + 8 * GetParam()) + turn;
    const auto half = static_cast<Half>((GetParam() + turn) % 4);
    WorldConfig config = (GetParam() + turn / 4) % 2 == 0 ? config_of(2, 2, seed) : config_of(3, 1, seed);
    config.routing = Routing::kUniform;
    config.rounds = kRounds;
    const auto struck = static_cast<uint32_t>(seed % config.world());
    CudaRank::Options options;
    options.timeout_ns = fault.survived ? 60'000'000'000 : 2'000'000'000;
    EmulatedCudaWorld world(config, emulated_profile("hostile"), options,
                            {{half, struck, 0, kStruckRound, fault.fault}});
    world.run(plan_rounds(config));
    std::vector<int64_t> blamed;
    uint32_t finished = 0;
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      finished += world.end(rank).finished ? 1 : 0;
      note_blame(rank, world.end(rank).error, blamed);
      // Who is neither finished nor told must be the one that is gone.
      EXPECT_TRUE(world.end(rank).finished || world.end(rank).error || rank == struck) << "rank " << rank;
    }
    EXPECT_EQ(finished == config.world(), fault.survived) << finished << " ranks finished";
    EXPECT_EQ(finished == config.world(), blamed.empty());
    const bool gone =
        fault.fault.kind == FaultKind::kDie || (fault.fault.kind == FaultKind::kFreeze && !fault.survived);
    EXPECT_TRUE(!gone || std::count(blamed.begin(), blamed.end(), struck))
        << "nobody names " << struck << ", but " << testing::PrintToString(blamed);
  }
}

INSTANTIATE_TEST_SUITE_P(All, FaultOnDevice, testing::Range(size_t{0}, faults().size()),
                         [](const auto& info) { return faults()[info.param].name; });

// Rounds in which a rank has no tokens and its experts get none.
CudaWorld::Plans plan_without(uint32_t lost, const WorldConfig& config) {
  Planner planner(config);
  CudaWorld::Plans plans(config.layout.channels);
  for (auto& rounds : plans) {
    for (uint32_t round = 0; round < config.rounds; ++round) {
      rounds.push_back(planner.plan([&](uint32_t rank, RankRound& plan) {
        if (rank == lost) plan = {};
        for (int64_t& id : plan.ids) {
          if (id >= 0 && config.expert_owner[static_cast<size_t>(id)] == lost) id = -1;
        }
      }));
    }
  }
  return plans;
}

// They come when the others begin to go on without it, and use the same memory again.
TEST(AfterALoss, WritesThatTheLostRankHadPostedLandNowhere) {
  if (kSanitized) GTEST_SKIP() << "kernels that a sanitizer slows down miss deadlines of their own accord";
  constexpr uint32_t kLost = 1;
  for (const auto& [nodes, ranks_per_node] : {Shape{2, 2}, Shape{3, 1}}) {
    WorldConfig config = config_of(nodes, ranks_per_node, test_seed(900 + nodes));
    config.routing = Routing::kUniform;
    config.rounds = 3;
    CudaRank::Options impatient;
    impatient.timeout_ns = 500'000'000;
    EmulatedCudaWorld world(
        config, emulated_profile("hostile"), impatient,
        {{Half::kDispatchSend, kLost, 0, 2, {.kind = FaultKind::kDie, .at_post = 2, .late_by = 1h}}});
    world.hold(1min);
    world.run(plan_rounds(config));
    for (uint32_t rank = 0; rank < config.world(); ++rank) EXPECT_FALSE(world.end(rank).finished);
    ASSERT_TRUE(world.in_flight());

    world.renew({});
    world.release();
    ASSERT_FALSE(world.in_flight());
    world.run(plan_without(kLost, config));
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      EXPECT_TRUE(world.end(rank).finished) << "rank " << rank << " of " << nodes << " nodes";
    }
  }
}

}  // namespace
}  // namespace efa_ep
