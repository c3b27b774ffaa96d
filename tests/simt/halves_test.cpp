// Whole rounds of the CUDA kernels against world_plan.h, bit for bit: the oracle that the CPU halves pass in
// tests/cpp/world_test.cpp. Mixed worlds show that both speak one protocol.
#include <gtest/gtest.h>

#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_world.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

template <class T>
T one_of(std::mt19937_64& random, const std::vector<T>& values) {
  return values[random() % values.size()];
}

// Settings by turns where every value has to appear, at random elsewhere.
WorldConfig draw(uint32_t nodes, uint32_t ranks_per_node, uint32_t turn, uint64_t seed) {
  std::mt19937_64 random(seed);
  WorldConfig config;
  config.seed = seed;
  config.layout.topology = {nodes * ranks_per_node, ranks_per_node};
  const uint32_t world = config.world();
  const uint32_t experts = turn % 3 == 2 ? 1 + random() % 12 : world * (1 + random() % 3);
  for (uint32_t expert = 0; expert < experts; ++expert) {  // in runs, in turn, or at random
    config.expert_owner.push_back(static_cast<uint32_t>(turn % 3 == 0   ? expert / (experts / world)
                                                        : turn % 3 == 1 ? expert % world
                                                                        : random() % world));
  }
  config.combine_type = static_cast<ScalarType>(turn / 2 % 3);
  config.per_expert = turn % 2 == 0;
  config.per_slot = !config.per_expert && turn / 2 % 2 == 0;
  config.weights_applied = !(config.per_expert || config.per_slot) || random() % 2 == 0;
  config.ids_are_64_bit = random() % 2 == 0;
  config.in_place = random() % 2 == 0;
  config.layout.row = {.top_k = one_of<uint32_t>(random, {1, 2, 3, 8, 32}),
                       .payload_bytes = one_of<uint32_t>(random, {16, 240, 1280, 5136}),
                       .scale_bytes = one_of<uint32_t>(random, {0, 5, 8, 16, 36}),
                       .combine_bytes = one_of<uint32_t>(random, {16, 256, 1040})};
  config.layout.max_tokens = one_of<uint32_t>(random, {1, 7, 33, 70});
  config.layout.channels = 1 + random() % 2;
  config.chunk_bytes = one_of<uint64_t>(random, {1, 512, 4096, 1 << 20});
  config.rails = 1 + random() % 3;
  config.send_queue_depth = 4 + random() % 16;
  config.proxy_threads = false;
  config.rounds = amount(3, 6);
  return config;
}

CudaRank::Options draw_options(uint64_t seed) {
  std::mt19937_64 random(~seed);
  CudaRank::Options options;
  options.num_sms = 1 + random() % (kSanitized ? 2 : 3);
  options.ring_capacity = 1u << random() % 7;
  options.tokens_on_device = random() % 2 == 0;
  return options;
}

class Worlds : public testing::TestWithParam<std::tuple<uint32_t, uint32_t>> {};

TEST_P(Worlds, RunTheirRounds) {
  const auto [nodes, ranks] = GetParam();
  for (uint32_t turn = 0; turn < amount(kSanitized ? 2 : 6, 60); ++turn) {
    const uint64_t seed = test_seed(100 * nodes + 10 * ranks + turn);
    const WorldConfig config = draw(nodes, ranks, turn, seed);
    CudaWorld(config, draw_options(seed)).run(plan_rounds(config));
    if (HasFailure()) return;
  }
}

// Odd ranks keep the CPU device.
TEST_P(Worlds, OfCudaAndCpuRanksRunTheirRounds) {
  const auto [nodes, ranks] = GetParam();
  if (nodes * ranks == 1) GTEST_SKIP() << "one rank cannot be of two kinds";
  for (uint32_t turn = 0; turn < amount(kSanitized ? 1 : 2, 20); ++turn) {
    const uint64_t seed = test_seed(1000 + 100 * nodes + 10 * ranks + turn);
    const WorldConfig config = draw(nodes, ranks, turn, seed);
    CudaWorld(config, draw_options(seed), [](uint32_t rank) {
      return rank % 2 == 0;
    }).run(plan_rounds(config));
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Nodes, Worlds,
                         testing::Values(std::tuple{1, 1}, std::tuple{1, 2}, std::tuple{1, 4},
                                         std::tuple{2, 1}, std::tuple{2, 2}, std::tuple{3, 2},
                                         std::tuple{4, 1}));

// A warp counts 32 tiles of 32 rows at a time, and every block has tiles that the last one to end reads.
TEST(Sets, OfManyTilesAreSharedByBlocks) {
  WorldConfig config = draw(1, 2, 0, test_seed(7));
  config.layout.row = {.top_k = 2, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 16};
  config.layout.max_tokens = kSanitized ? 600 : 2500;
  config.layout.channels = 1;
  config.expert_owner = {0, 1};
  config.routing = Routing::kUniform;
  config.rounds = 3;
  CudaWorld(config, {.num_sms = 2}).run(plan_rounds(config));
}

// A release at system scope makes an SM wait for all its writes. The kernels make one per chunk, and one per
// flag for a rank of the own node.
TEST(Releases, AreOnePerChunkAndPair) {
  for (const auto& [nodes, ranks] : {std::pair{1u, 4u}, std::pair{3u, 1u}, std::pair{3u, 2u}}) {
    WorldConfig config = draw(nodes, ranks, 1, test_seed(9));
    config.layout.channels = 1;
    config.rounds = 2;
    CudaWorld world(config, {});
    const uint64_t before = simt::system_releases();
    world.run(plan_rounds(config));
    const uint32_t other_rails =
        nodes * (ranks - 1) + 1;  // the flags of a half: all pairs but the own rail's
    uint64_t want = 2 * config.rounds * config.world() * other_rails;
    for (uint32_t rank = 0; rank < config.world() && nodes > 1; ++rank) {
      want += world.world().proxy(rank)->counters().writes;
    }
    EXPECT_EQ(simt::system_releases() - before, want);
  }
}

// ThreadSanitizer has fewer clocks than there are threads here, and may miss a race between two ranks, which
// it does not in smaller worlds. Four turns have all layouts.
TEST(LargeWorld, OfFourNodesWithFourRanksRunsItsRounds) {
  for (uint32_t turn = 0; turn < amount(kThreadSanitized ? 1 : kSanitized ? 2 : 4, 12); ++turn) {
    const uint64_t seed = test_seed(44 + turn);
    const WorldConfig config = draw(4, 4, turn, seed);
    CudaWorld(config, draw_options(seed)).run(plan_rounds(config));
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace efa_ep
