// Every fault before every half of a round, in several shapes: each rank ends in success with the right
// tokens or in a typed error that names somebody, before its deadline, and nothing hangs.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "emulated_world_fixture.h"
#include "errors.h"

namespace efa_ep {
namespace {

constexpr uint32_t kRounds = 4;
constexpr uint32_t kStruckRound = 2;
constexpr std::chrono::nanoseconds kDeadline = 50ms;

enum class Ending { kSurvival, kErrors, kEither };

struct NamedFault {
  std::string name;
  Fault fault;
  Ending ending;
};

std::vector<NamedFault> faults() {
  return {
      {"ProcessDies", {.kind = FaultKind::kDie, .after_death = AfterDeath::kRefuses}, Ending::kErrors},
      {"MachineDies", {.kind = FaultKind::kDie, .after_death = AfterDeath::kUnreachable}, Ending::kErrors},
      {"DiesSilently", {.kind = FaultKind::kDie, .after_death = AfterDeath::kSilent}, Ending::kErrors},
      {"DiesAtItsNextWrite", {.kind = FaultKind::kDie, .at_post = 1}, Ending::kErrors},
      {"DiesAndItsWritesComeLate", {.kind = FaultKind::kDie, .late_by = 20ms}, Ending::kErrors},
      {"Freezes", {.kind = FaultKind::kFreeze}, Ending::kErrors},
      {"FreezesPastTheDeadline", {.kind = FaultKind::kFreeze, .duration = 80ms}, Ending::kErrors},
      {"FreezesForAWhile", {.kind = FaultKind::kFreeze, .duration = 10ms}, Ending::kSurvival},
      {"LosesItsNics", {.kind = FaultKind::kLoseNic}, Ending::kErrors},
      {"LosesANic", {.kind = FaultKind::kLoseNic, .rail = 1}, Ending::kEither},
      {"AWriteFails", {.kind = FaultKind::kFailWrites}, Ending::kErrors},
      {"PostsAreRefused", {.kind = FaultKind::kRefusePosts}, Ending::kErrors},
      {"PostsAreRefusedForAWhile", {.kind = FaultKind::kRefusePosts, .duration = 10ms}, Ending::kSurvival},
      {"Retransmissions", {.kind = FaultKind::kLosePieces, .writes = 20, .losses = 10}, Ending::kSurvival},
  };
}

using Shape = std::pair<uint32_t, uint32_t>;  // nodes, ranks per node

/// A half that gave up says how long it waited, in the network's time.
void expect_whole_deadline(const std::string& what) {
  const std::string before = " waited ";
  const size_t at = what.find(before);
  if (at == std::string::npos) return;  // a post that was refused to the end
  EXPECT_GE(std::stod(what.substr(at + before.size())), std::chrono::duration<double>(kDeadline).count())
      << what;
}

class EmulatedWorldFault : public ::testing::TestWithParam<std::tuple<size_t, Half>> {
 protected:
  /// Success, or an error that says who is to blame, never itself.
  void expect_named(EmulatedWorld& world, uint32_t rank, std::vector<int64_t>& blamed) const {
    try {
      if (world.error(rank)) std::rethrow_exception(world.error(rank));
    } catch (const TransportError& error) {
      blamed.push_back(error.peer);
    } catch (const RankTimeoutError& error) {
      EXPECT_FALSE(error.missing.empty()) << error.what();
      EXPECT_FALSE(std::count(error.missing.begin(), error.missing.end(), rank)) << error.what();
      expect_whole_deadline(error.what());
      blamed.insert(blamed.end(), error.missing.begin(), error.missing.end());
    } catch (const std::exception& error) {
      ADD_FAILURE() << "rank " << rank << " ended in " << error.what();
    }
  }
};

INSTANTIATE_TEST_SUITE_P(All, EmulatedWorldFault,
                         ::testing::Combine(::testing::Range(size_t{0}, faults().size()),
                                            ::testing::Values(Half::kDispatchSend, Half::kDispatchRecv,
                                                              Half::kCombineSend, Half::kCombineRecv)),
                         [](const auto& info) {
                           return faults()[std::get<0>(info.param)].name + "Before_" +
                                  kHalfNames[static_cast<size_t>(std::get<1>(info.param))];
                         });

TEST_P(EmulatedWorldFault, EndsInSurvivalOrInANamedError) {
  const NamedFault fault = faults()[std::get<0>(GetParam())];
  for (const auto& [nodes, ranks_per_node] : {Shape{2, 1}, Shape{4, 1}, Shape{2, 3}, Shape{3, 2}}) {
    for (uint32_t i = 0; i < amount(5, 100) && !HasFailure(); ++i) {
      const uint64_t seed = test_seed(81) + i;
      const ::testing::ScopedTrace trace(__FILE__, __LINE__, replay(seed));
      WorldConfig config = emulated_config(nodes, ranks_per_node, seed);
      config.chunk_bytes = 100;
      PlannedWorkload workload(config, kRounds);
      EmulatedWorldOptions options = options_of(config, emulated_profile("hostile"));
      options.timeout = kDeadline;
      EmulatedWorld world(options);
      workload.use(world);
      const auto struck = static_cast<uint32_t>(seed % config.world());
      Fault struck_fault = fault.fault;
      struck_fault.rank = struck;
      world.inject_before(std::get<1>(GetParam()), {struck, 0, kStruckRound}, struck_fault);
      world.run(workload, kRounds);

      // Each rank waits for at most one deadline, but a chain of ranks may wait for each other in turn.
      EXPECT_LT(world.network().now(), kDeadline * (config.world() + 1));
      std::vector<int64_t> blamed;
      uint32_t finished = 0;
      for (uint32_t rank = 0; rank < config.world(); ++rank) {
        expect_named(world, rank, blamed);
        finished += world.finished_rounds(rank, 0) == kRounds;
        const bool ended = world.finished_rounds(rank, 0) == kRounds || world.error(rank) ||
                           !world.network().alive(rank) || world.network().frozen(rank);
        EXPECT_TRUE(ended) << "rank " << rank << " hangs";
      }
      EXPECT_TRUE(fault.ending == Ending::kEither ||
                  (finished == config.world()) == (fault.ending == Ending::kSurvival))
          << finished << " of " << config.world() << " ranks finished";
      EXPECT_EQ(finished == config.world(), blamed.empty());
      const bool gone = fault.fault.kind == FaultKind::kDie ||
                        (fault.fault.kind == FaultKind::kFreeze && !fault.fault.duration);
      if (gone) {
        EXPECT_EQ(finished, 0U) << "somebody finished without rank " << struck;
        EXPECT_TRUE(std::count(blamed.begin(), blamed.end(), struck)) << "nobody names rank " << struck;
      }
    }
  }
}

}  // namespace
}  // namespace efa_ep
