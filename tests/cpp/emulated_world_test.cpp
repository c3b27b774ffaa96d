// Whole worlds on an emulated network in one thread: every layout, bit for bit against the plan, whatever the
// network does.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "emulated_world_fixture.h"

namespace efa_ep {
namespace {

/// Runs all rounds of the plan and returns the trace's hash.
uint64_t run_world(const WorldConfig& config, const EmulatedProfile& profile, PlannedWorkload& workload) {
  const ::testing::ScopedTrace trace(__FILE__, __LINE__, replay(config.seed));
  const ::testing::ScopedTrace about(__FILE__, __LINE__, ::testing::Message() << config);
  const uint64_t before = workload.finished_turns();
  EmulatedWorld world(options_of(config, profile));
  workload.use(world);
  world.run(workload, config.rounds);
  expect_success(world, config.world());
  EXPECT_EQ(workload.finished_turns() - before,
            uint64_t{config.world()} * config.layout.channels * config.rounds);
  return world.network().trace_hash();
}

class EmulatedLayouts : public ::testing::TestWithParam<uint32_t> {};

// One thread has no races, and takes minutes under ThreadSanitizer.
INSTANTIATE_TEST_SUITE_P(Nodes, EmulatedLayouts, ::testing::Range(1U, kThreadSanitized ? 5U : 17U),
                         [](const auto& info) { return std::to_string(info.param) + "Nodes"; });

TEST_P(EmulatedLayouts, MatchThePlan) {
  const uint64_t seed = test_seed(61);
  for (uint32_t ranks_per_node = 1; ranks_per_node <= 8 && !HasFailure(); ++ranks_per_node) {
    WorldConfig config = emulated_config(GetParam(), ranks_per_node, seed);
    config.per_expert = ranks_per_node % 2 == 0;
    config.in_place = ranks_per_node % 3 != 0;
    config.layout.channels = 1 + (GetParam() + ranks_per_node) % 2;
    config.rounds = amount(2, 20);
    PlannedWorkload workload(config, config.rounds);
    run_world(config, emulated_profile("hostile"), workload);
  }
}

// One plan, many networks: the result does not depend on the network, and no two networks are the same.
TEST(EmulatedWorlds, ResultsAreEqualForAllSeeds) {
  const uint64_t seed = test_seed(62);
  WorldConfig config = emulated_config(3, 2, seed);
  config.layout.channels = 2;
  config.chunk_bytes = 128;
  config.rounds = 3;
  PlannedWorkload workload(config, config.rounds);
  std::set<uint64_t> hashes;
  constexpr uint32_t kSeeds = kThreadSanitized ? 20 : 1000;
  for (config.seed = seed; config.seed < seed + kSeeds && !::testing::Test::HasFailure(); ++config.seed) {
    hashes.insert(run_world(config, emulated_profile("hostile"), workload));
  }
  EXPECT_EQ(hashes.size(), kSeeds);
}

TEST(EmulatedWorlds, OneSeedIsOneRun) {
  const WorldConfig config = emulated_config(4, 2, test_seed(63));
  PlannedWorkload workload(config, config.rounds);
  EXPECT_EQ(run_world(config, emulated_profile("hostile"), workload),
            run_world(config, emulated_profile("hostile"), workload));
}

// Writes of a run, counted by the protocol's formula from the plan alone.
TEST(EmulatedWorlds, PostAsManyWritesAsTheFormulaSays) {
  WorldConfig config = emulated_config(4, 2, test_seed(64));
  config.rounds = 5;
  config.chunk_bytes = 1;  // a row is a chunk, and a pair without rows has one
  PlannedWorkload workload(config, config.rounds);
  EmulatedWorld world(options_of(config, emulated_profile("p5en")));
  workload.use(world);
  world.run(workload, config.rounds);
  expect_success(world, config.world());
  const Topology topology = config.layout.topology;
  const auto goes_to_node = [&](const RankRound& round, uint32_t token, uint32_t node) {
    for (uint32_t slot = 0; slot < config.layout.row.top_k; ++slot) {
      const int64_t id = round.ids[token * config.layout.row.top_k + slot];
      if (id >= 0 && topology.node_of(config.expert_owner[static_cast<size_t>(id)]) == node) return true;
    }
    return false;
  };
  const auto writes = [&](uint32_t source, uint32_t node, uint32_t round) {
    const RankRound& plan = workload.plan({source, 0, round});
    uint64_t rows = 0;
    for (uint32_t token = 0; token < plan.tokens; ++token) rows += goes_to_node(plan, token, node);
    return std::max<uint64_t>(rows, 1);
  };
  for (uint32_t rank = 0; rank < config.world(); ++rank) {
    uint64_t expected = 0;
    for (uint32_t round = 1; round <= config.rounds; ++round) {
      for (uint32_t node = 0; node < topology.nodes(); ++node) {
        if (node == topology.node_of(rank)) continue;
        const uint32_t peer = topology.rail_peer(rank, node);
        expected += writes(rank, node, round) + writes(peer, topology.node_of(rank), round);
      }
    }
    EXPECT_EQ(world.network().counters(rank).posted, expected) << "rank " << rank;
    EXPECT_EQ(world.proxy(rank)->counters().writes, expected) << "rank " << rank;
  }
}

// A rank may hear of its peer's next dispatch before the acknowledgement of what that peer has read: it must
// not make new results where the unacknowledged ones lie.
TEST(EmulatedWorlds, KeepResultsUntilTheirWritesAreComplete) {
  WorldConfig config = emulated_config(2, 1, test_seed(66));
  config.layout.max_tokens = 1;  // one piece per write, so that one jitter decides
  config.routing = Routing::kDistinct;
  config.rounds = 500;
  EmulatedProfile profile = emulated_profile("hostile");
  profile.mtu = 4096;
  profile.lost_pieces_per_million = 0;
  PlannedWorkload workload(config, config.rounds);
  run_world(config, profile, workload);
}

// Rounds clock themselves past the wrap of the round tag.
TEST(EmulatedWorlds, RunHundredsOfRounds) {
  WorldConfig config = emulated_config(4, 1, test_seed(65));
  config.layout.channels = 2;
  config.rounds = amount(200, 2000);
  PlannedWorkload workload(config, config.rounds);
  run_world(config, emulated_profile("hostile"), workload);
}

// Devices take no virtual time: without jitter, a round takes its two ways through the network, whatever the
// other rounds did. Rows that waited anywhere for a rank's next turn would make it three.
TEST(EmulatedWorlds, TakeTheTimeOfTheirTwoWays) {
  WorldConfig config = emulated_config(2, 4, test_seed(67));
  config.rounds = 20;
  config.chunk_bytes = 1 << 20;  // a write per NIC: none waits for the one before it
  EmulatedProfile profile = emulated_profile("p5en");
  profile.jitter = {};
  PlannedWorkload workload(config, config.rounds);
  EmulatedWorld world(options_of(config, profile));
  workload.use(world);
  world.run(workload, config.rounds);
  expect_success(world, config.world());
  const uint32_t ways = 2 * config.rounds + 1;  // at the end the last acknowledgement
  constexpr std::chrono::nanoseconds kBytesOfAWay(100);
  EXPECT_GE(world.network().now(), ways * profile.latency);
  EXPECT_LE(world.network().now(), ways * (profile.latency + kBytesOfAWay));
}

}  // namespace
}  // namespace efa_ep
