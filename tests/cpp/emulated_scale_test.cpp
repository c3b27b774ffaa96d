// As many ranks as the product promises, in one process and one thread.
#include <gtest/gtest.h>

#include "emulated_world_fixture.h"

namespace efa_ep {
namespace {

/// Runs the rounds of a plan again and again.
class RepeatedWorkload final : public EmulatedWorkload {
 public:
  RepeatedWorkload(const WorldConfig& config, uint32_t planned) : plan_(config, planned), planned_(planned) {}
  DispatchInput tokens(const EmulatedTurn& turn) override { return plan_.tokens(planned(turn)); }
  DispatchOutput receive(const EmulatedTurn& turn, uint32_t rows) override {
    return plan_.receive(planned(turn), rows);
  }
  CombineInput results(const EmulatedTurn& turn) override { return plan_.results(planned(turn)); }
  std::byte* output(const EmulatedTurn& turn) override { return plan_.output(planned(turn)); }
  void finished(const EmulatedTurn& turn) override { plan_.finished(planned(turn)); }
  void use(EmulatedWorld& world) { plan_.use(world); }
  uint64_t finished_turns() const { return plan_.finished_turns(); }

 private:
  EmulatedTurn planned(EmulatedTurn turn) const {
    turn.round = (turn.round - 1) % planned_ + 1;
    return turn;
  }
  PlannedWorkload plan_;
  const uint32_t planned_;
};

void run_at_scale(const WorldConfig& config) {
  const ::testing::ScopedTrace trace(__FILE__, __LINE__, replay(config.seed));
  RepeatedWorkload workload(config, 2);  // two plans, so that no round finds its own rows of the last
  EmulatedWorldOptions options = options_of(config, emulated_profile("p5en"));
  options.network.check_sources = false;
  EmulatedWorld world(options);
  workload.use(world);
  world.run(workload, config.rounds);
  expect_success(world, config.world());
  EXPECT_EQ(workload.finished_turns(), uint64_t{config.world()} * config.rounds);
  // At least one write per pair and operation, at most one per row: a pair never has more than its tokens.
  const uint64_t pairs = uint64_t{2} * (config.layout.topology.nodes() - 1) * config.rounds;
  for (uint32_t rank = 0; rank < config.world(); ++rank) {
    EXPECT_GE(world.network().counters(rank).posted, pairs);
    EXPECT_LE(world.network().counters(rank).posted, pairs * options.network.profile.nics);
  }
}

// 16 nodes of 8 ranks, 32 tokens of hidden size 1024 in bfloat16. No pair exceeds a chunk, so each pair is
// cut for the NICs alone.
TEST(EmulatedScale, A128RankWorld) {
  if (kThreadSanitized) GTEST_SKIP() << "one thread has no races, and takes minutes under ThreadSanitizer";
  WorldConfig config = emulated_config(16, 8, test_seed(91));
  config.layout.row = {.top_k = 8, .payload_bytes = 2048, .scale_bytes = 0, .combine_bytes = 2048};
  config.layout.max_tokens = 32;
  config.chunk_bytes = 256 * 1024;
  config.routing = Routing::kDistinct;
  config.rounds = 100;
  run_at_scale(config);
}

TEST(EmulatedScale, A1024RankWorld) {
  if (amount(0, 1) == 0) GTEST_SKIP() << "takes a minute, most of it for the plan; LONG_TESTS=1 runs it";
  WorldConfig config = emulated_config(128, 8, test_seed(92));
  config.layout.max_tokens = 1;
  config.chunk_bytes = 256 * 1024;
  config.rounds = 2;
  run_at_scale(config);
}

}  // namespace
}  // namespace efa_ep
