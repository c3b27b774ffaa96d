// Whole rounds against world_plan.h, bit for bit: many shapes and settings, no barrier between ranks, a
// network that disorders everything, ranks that stop and go at random.
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "test_environment.h"
#include "world.h"

namespace efa_ep {
namespace {

struct Step {
  uint32_t channel;
  uint32_t round;
  Half half;
};

// The halves of some channels, interleaved at random. Every rank takes the same order: a rank that waits on
// one channel does nothing for the other.
std::vector<Step> interleave(const std::vector<uint32_t>& channels, uint32_t rounds, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> done(channels.size(), 0);
  std::vector<Step> steps;
  while (steps.size() < channels.size() * rounds * 4) {
    const size_t i = random() % channels.size();
    if (done[i] == rounds * 4) continue;
    steps.push_back({channels[i], done[i] / 4, static_cast<Half>(done[i] % 4)});
    ++done[i];
  }
  return steps;
}

using Plans = std::vector<std::vector<std::vector<RankRound>>>;  // [channel][round][rank]

// One rank's thread. Sometimes it lets the others run ahead before a half.
void run_rank(World& world, uint32_t rank, const std::vector<Step>& steps, const Plans& plans) {
  std::mt19937_64 random(world.config().seed * 1000 + rank);
  const testing::ScopedTrace config(__FILE__, __LINE__, testing::Message() << world.config());
  try {
    for (const Step& step : steps) {
      const testing::ScopedTrace where(__FILE__, __LINE__,
                                       testing::Message() << kHalfNames[static_cast<size_t>(step.half)]
                                                          << " of round " << step.round + 1 << " on rank "
                                                          << rank << ", channel " << step.channel);
      for (uint64_t yields = random() % 8 == 0 ? random() % 100 : 0; yields > 0; --yields) sched_yield();
      world.run(step.half, rank, step.channel, plans[step.channel][step.round][rank]);
    }
    // Without a thread of its own a proxy is left with what the last half did not get to.
    if (world.proxy(rank) != nullptr) world.proxy(rank)->drain(kPatience);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "rank " << rank << ": " << error.what();
  }
}

void check_counters(World& world, const Plans& plans) {
  for (uint32_t rank = 0; rank < world.config().world(); ++rank) {
    DeviceCounters want;
    for (const auto& rounds : plans) {
      for (const auto& round : rounds) {
        want.rounds += 1;
        want.tokens += round[rank].tokens;
        want.received_rows += round[rank].rows;
        want.network_rows += round[rank].network_rows;
        want.peer_rows += round[rank].peer_rows;
      }
    }
    const DeviceCounters got = world.device(rank).counters();
    EXPECT_EQ(got.rounds, want.rounds);
    EXPECT_EQ(got.tokens, want.tokens);
    EXPECT_EQ(got.received_rows, want.received_rows);
    EXPECT_EQ(got.network_rows, want.network_rows);
    EXPECT_EQ(got.peer_rows, want.peer_rows);
  }
}

void run_world(const WorldConfig& config) {
  Planner planner(config);
  Plans plans(config.layout.channels);
  for (auto& rounds : plans) {
    for (uint32_t round = 0; round < config.rounds; ++round) rounds.push_back(planner.plan());
  }
  std::vector<std::vector<Step>> schedules;
  if (config.thread_per_channel) {
    for (uint32_t channel = 0; channel < config.layout.channels; ++channel) {
      schedules.push_back(interleave({channel}, config.rounds, config.seed));
    }
  } else {
    std::vector<uint32_t> channels(config.layout.channels);
    for (uint32_t channel = 0; channel < config.layout.channels; ++channel) channels[channel] = channel;
    schedules.push_back(interleave(channels, config.rounds, config.seed));
  }
  World world(config);
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < config.world(); ++rank) {
    for (const auto& steps : schedules) {
      threads.emplace_back([&, rank] { run_rank(world, rank, steps, plans); });
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (!testing::Test::HasFailure()) check_counters(world, plans);
}

// Owner of every expert: in equal runs, dealt out in turn, or at random (some ranks may have none).
std::vector<uint32_t> place(std::mt19937_64& random, uint32_t world, uint32_t kind) {
  const uint32_t experts = kind == 2 ? 1 + random() % 12 : world * (1 + random() % 3);
  std::vector<uint32_t> owners;
  for (uint32_t expert = 0; expert < experts; ++expert) {
    const auto any = static_cast<uint32_t>(random() % world);
    owners.push_back(kind == 0 ? expert / (experts / world) : kind == 1 ? expert % world : any);
  }
  return owners;
}

template <class T>
T one_of(std::mt19937_64& random, const std::vector<T>& values) {
  return values[random() % values.size()];
}

// Settings by turns where every value has to appear, at random elsewhere.
WorldConfig draw(Topology topology, uint32_t turn, uint64_t seed) {
  std::mt19937_64 random(seed);
  WorldConfig config;
  config.seed = seed;
  config.expert_owner = place(random, topology.world, random() % 3);
  config.combine_type = static_cast<ScalarType>(turn / 2 % 3);
  config.per_expert = turn % 2 == 0;
  config.per_slot = !config.per_expert && turn / 2 % 2 == 0;
  config.weights_applied = !(config.per_expert || config.per_slot) || random() % 2 == 0;
  config.ids_are_64_bit = random() % 2 == 0;
  config.in_place = random() % 2 == 0;
  config.cached_bytes = one_of<size_t>(random, {0, 200, std::numeric_limits<size_t>::max()});
  config.layout.topology = topology;
  config.layout.row = {.top_k = one_of<uint32_t>(random, {1, 2, 3, 4, 5, 6, 7, 8, 32}),
                       .payload_bytes = one_of<uint32_t>(random, {16, 48, 176}),
                       .scale_bytes = one_of<uint32_t>(random, {0, 4, 20}),
                       .combine_bytes = one_of<uint32_t>(random, {16, 80})};
  config.layout.max_tokens = one_of<uint32_t>(random, {1, 2, 7, 13});
  config.layout.channels = 1 + turn / 6 % 2;
  config.thread_per_channel = random() % 2 == 0;
  config.chunk_bytes = one_of<uint64_t>(random, {1, 300, 65536});
  config.rails = 1 + random() % 3;
  config.ring_commands = one_of<uint32_t>(random, {1, 4, 4096});
  config.send_queue_depth = one_of<uint32_t>(random, {1, 4, 32});
  config.proxy_threads = random() % 2 == 0;
  config.rounds = 8;
  return config;
}

class WorldShape : public testing::TestWithParam<std::pair<uint32_t, uint32_t>> {
 protected:
  Topology topology() const {
    const auto [nodes, ranks_per_node] = GetParam();
    return {nodes * ranks_per_node, ranks_per_node};
  }
};

std::string shape_name(const testing::TestParamInfo<std::pair<uint32_t, uint32_t>>& info) {
  return std::to_string(info.param.first) + "x" + std::to_string(info.param.second);
}

using Shape = std::pair<uint32_t, uint32_t>;
INSTANTIATE_TEST_SUITE_P(Nodes, WorldShape,
                         testing::Values(Shape{1, 1}, Shape{1, 2}, Shape{1, 4}, Shape{2, 1}, Shape{3, 1},
                                         Shape{4, 1}, Shape{2, 2}, Shape{3, 2}, Shape{2, 3}, Shape{4, 2}),
                         shape_name);

TEST_P(WorldShape, MatchesTheScalarRecomputation) {
  const uint32_t worlds = amount(12, 200);
  const uint64_t seed = test_seed(1 + topology().world * 100 + topology().ranks_per_node * 10'000);
  for (uint32_t turn = 0; turn < worlds && !HasFailure(); ++turn) {
    run_world(draw(topology(), turn, seed + turn));
  }
}

// Rounds clock themselves: 100 of them without a barrier, past the wrap of the round tag, with single-row
// chunks and little to do, so that fast ranks run ahead as far as the protocol lets them.
TEST_P(WorldShape, ManyRoundsClockThemselves) {
  const uint64_t seed = test_seed(2 + topology().world * 100 + topology().ranks_per_node * 10'000);
  WorldConfig config = draw(topology(), 1, seed);
  config.layout.row = {.top_k = 2, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 16};
  config.layout.max_tokens = 3;
  config.layout.channels = 2;
  config.chunk_bytes = 1;
  config.rounds = amount(100, 2000);
  run_world(config);
}

// Routings that empty or overfill whole pairs, alone.
class WorldRouting : public testing::TestWithParam<Routing> {};

INSTANTIATE_TEST_SUITE_P(All, WorldRouting,
                         testing::Values(Routing::kUniform, Routing::kDistinct, Routing::kSparse,
                                         Routing::kRepeated, Routing::kOneExpert, Routing::kAllDropped,
                                         Routing::kNoTokens));

TEST_P(WorldRouting, MatchesTheScalarRecomputation) {
  for (const bool per_expert : {false, true}) {
    const uint64_t seed = test_seed(3 + per_expert);
    WorldConfig config = draw({4, 2}, per_expert ? 0 : 1, seed);
    config.routing = GetParam();
    run_world(config);
  }
}

// The protocol knows of no signal policy, so each of them must carry it.
class WorldSignals : public testing::TestWithParam<SignalPolicyKind> {};

INSTANTIATE_TEST_SUITE_P(All, WorldSignals, testing::ValuesIn(kSignalPolicies),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(WorldSignals, MatchTheScalarRecomputation) {
  for (uint32_t turn = 0; turn < amount(6, 60) && !HasFailure(); ++turn) {
    WorldConfig config = draw({6, 2}, turn, test_seed(7) + turn);
    config.signal_policy = GetParam();
    run_world(config);
  }
}

// A rank that owns no expert passes no pointer to rows, and one without tokens none to tokens.
TEST(World, RanksWithoutExpertsAndWithoutTokens) {
  for (const uint32_t turn : {0u, 1u}) {
    WorldConfig config = draw({4, 2}, turn, test_seed(5));
    config.expert_owner = {2, 2, 2};
    run_world(config);
    config.routing = Routing::kNoTokens;
    run_world(config);
  }
}

}  // namespace
}  // namespace efa_ep
