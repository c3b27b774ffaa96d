// Ranks of an emulated network that die, freeze and thaw.
#include <gtest/gtest.h>

#include <array>
#include <set>
#include <string>
#include <vector>

#include "emulated_fixture.h"

namespace efa_ep {
namespace {

using std::chrono::nanoseconds;

constexpr nanoseconds kLatency = 5us;  // of plain_profile(), where a byte takes 1 ns
constexpr nanoseconds kPiece = 100ns;  // and a piece has 100 bytes
constexpr nanoseconds kGiveUp = 10ms;  // on a target that does not answer

class EmulatedDeath : public EmulatedTest {
 protected:
  void kill(uint32_t rank, AfterDeath after_death) {
    network_->inject({.kind = FaultKind::kDie, .rank = rank, .after_death = after_death});
  }
};

TEST_F(EmulatedDeath, ADeadRankDoesNothing) {
  start(2);
  post(1, 0, 100);
  network_->inject({.kind = FaultKind::kDie, .rank = 0, .at_post = 2});
  EXPECT_EQ(post(0, 1, 100), PostResult::kPosted);
  EXPECT_TRUE(network_->alive(0));
  EXPECT_EQ(post(0, 1, 100), PostResult::kPosted);
  EXPECT_FALSE(network_->alive(0));
  EXPECT_EQ(post(0, 1, 100), PostResult::kAgain);
  run();
  EXPECT_TRUE(arrivals(0).empty());
  EXPECT_TRUE(done(0).empty());
}

TEST_F(EmulatedDeath, ADeadProcessIsRefusedByItsNic) {
  start(2);
  kill(1, AfterDeath::kRefuses);
  post(0, 1, 1'000);
  run();
  EXPECT_NE(error_of(0).find("EFA status 9, REMOTE_BAD_DEST_QPN"), std::string::npos);
  EXPECT_EQ(errors(0)[0].time, kPiece + 2 * kLatency);
}

TEST_F(EmulatedDeath, ADeadMachineIsUnreachableAfterATime) {
  start(2);
  kill(1, AfterDeath::kUnreachable);
  post(0, 1, 1'000);
  run();
  EXPECT_NE(error_of(0).find("EFA status 15, UNREACH_REMOTE"), std::string::npos);
  EXPECT_EQ(errors(0)[0].time, kPiece + kLatency + kGiveUp);
}

TEST_F(EmulatedDeath, AMachineThatDiesInTheMiddleOfAWriteStoppedAnswering) {
  start(2);
  network_->inject(
      {.kind = FaultKind::kDie, .rank = 1, .at = kLatency + 5us, .after_death = AfterDeath::kUnreachable});
  post(0, 1, 10'000);
  run();
  EXPECT_NE(error_of(0).find("EFA status 13, UNRESP_REMOTE"), std::string::npos);
}

// Nothing is said, no time passes, and the queue stays full.
TEST_F(EmulatedDeath, ASilentDeathIsNeverReported) {
  profile_.send_queue_depth = 3;
  start(2);
  kill(1, AfterDeath::kSilent);
  for (int i = 0; i < 3; ++i) post(0, 1, 1'000);
  run();
  EXPECT_TRUE(told_.empty());
  EXPECT_EQ(post(0, 1, 1'000), PostResult::kAgain);
  network_->advance_to(1h);
  EXPECT_FALSE(network_->advance_until_woken());
}

// What a rank had posted lands in full, in part or not at all; its memory is not read any more.
TEST_F(EmulatedDeath, WhatADeadRankHadPostedMayLand) {
  size_t in_full = 0, in_part = 0, not_at_all = 0;
  for (uint32_t i = 0; i < 60; ++i) {
    start(2, seed_ + i);
    fill(0, std::byte{7});
    post(0, 1, 10'000);
    if (i % 2 == 1) network_->advance_to(5us);
    kill(0, AfterDeath::kRefuses);
    fill(0, std::byte{9});
    run();
    const size_t landed = bytes_with(1, std::byte{7}, 10'000);
    EXPECT_EQ(bytes_with(1, std::byte{0}, 10'000), 10'000 - landed);
    EXPECT_EQ(arrivals(1).size(), landed == 10'000 ? 1U : 0U);
    ++(landed == 10'000 ? in_full : landed > 0 ? in_part : not_at_all);
  }
  EXPECT_GT(in_full, 10U);
  EXPECT_GT(in_part, 5U);
  EXPECT_GT(not_at_all, 5U);
}

TEST_F(EmulatedDeath, LateWritesOfADeadRankLandInFull) {
  start(2);
  fill(0, std::byte{7});
  for (uint32_t number = 0; number < 5; ++number) post(0, 1, 10'000, number);
  network_->inject({.kind = FaultKind::kDie, .rank = 0, .at = 12us, .late_by = 3ms});
  run_until(12us);
  fabrics_[0].reset();
  fill(0, std::byte{9});
  run_until(2ms);
  EXPECT_TRUE(arrivals(1).empty());
  EXPECT_LT(bytes_with(1, std::byte{7}, 10'000), 10'000U);
  run();
  EXPECT_EQ(arrivals(1).size(), 5U);
  EXPECT_GE(arrivals(1)[0].time, 12us + 3ms);
  EXPECT_EQ(bytes_with(1, std::byte{7}, 10'000), 10'000U);
}

// The answer to late writes: a survivor registers its memory again.
TEST_F(EmulatedDeath, LateWritesDoNotLandInANewRegistration) {
  start(2);
  fill(0, std::byte{7});
  post(0, 1, 10'000);
  network_->inject({.kind = FaultKind::kDie, .rank = 0, .late_by = 3ms});
  fabric(1).register_memory(memory(1), kMemory);
  run();
  EXPECT_TRUE(arrivals(1).empty());
  EXPECT_EQ(bytes_with(1, std::byte{0}, kMemory), kMemory);
}

TEST_F(EmulatedDeath, DestructionIsDeath) {
  start(2);
  post(0, 1, 10'000);
  post(1, 0, 10'000);
  network_->advance_to(kLatency + 1us);
  fabrics_[0].reset();
  memories_[0] = TestMemory(kMemory);  // the old memory is gone; the sanitizers watch
  EXPECT_FALSE(network_->alive(0));
  run();
  EXPECT_NE(error_of(1).find("REMOTE_BAD_DEST_QPN"), std::string::npos);
}

// The NIC of a frozen process goes on: its memory is written, its writes go out, its queue fills.
TEST_F(EmulatedDeath, AFrozenRankDoesNothingButItsNicGoesOn) {
  start(3);
  fill(2, std::byte{7});
  post(0, 1, 100, 1);
  network_->inject({.kind = FaultKind::kFreeze, .rank = 0, .at_post = 1, .duration = 400us});
  EXPECT_EQ(post(0, 1, 100, 2), PostResult::kPosted);
  EXPECT_TRUE(network_->frozen(0));
  EXPECT_EQ(post(0, 1, 100, 3), PostResult::kAgain);
  post(2, 0, 100, 4);
  run_until(399us);
  EXPECT_EQ(arrivals(1).size(), 2U);
  EXPECT_EQ(bytes_with(0, std::byte{7}, 100), 100U);
  EXPECT_TRUE(done(0).empty());
  network_->take_woken();
  ASSERT_TRUE(network_->advance_until_woken());
  EXPECT_EQ(network_->now(), 400us);
  EXPECT_EQ(network_->take_woken(), std::vector<uint32_t>{0});
  EXPECT_FALSE(network_->frozen(0));
  poll_all();
  EXPECT_EQ(done(0).size(), 2U);
  EXPECT_EQ(arrivals(0).size(), 1U);
}

TEST_F(EmulatedDeath, AFrozenRankThawsOnOrder) {
  start(2);
  network_->inject({.kind = FaultKind::kFreeze, .rank = 0});
  network_->inject({.kind = FaultKind::kThaw, .rank = 0, .at = 1h});
  EXPECT_EQ(post(0, 1, 100), PostResult::kAgain);
  ASSERT_TRUE(network_->advance_until_woken());
  EXPECT_EQ(network_->now(), 1h);
  EXPECT_EQ(post(0, 1, 100), PostResult::kPosted);
}

}  // namespace
}  // namespace efa_ep
