#include "small_world.h"

#include <gtest/gtest.h>

#include <exception>
#include <thread>

#include "test_environment.h"

namespace efa_ep {

WorldConfig small_config(uint32_t nodes, uint32_t ranks_per_node) {
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

}  // namespace efa_ep
