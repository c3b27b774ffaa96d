// Every fault that an emulated network knows, one by one, and what it must and must not do.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "emulated_fixture.h"
#include "errors.h"

namespace efa_ep {
namespace {

using std::chrono::nanoseconds;

constexpr nanoseconds kLatency = 5us;   // of plain_profile(), where a byte takes 1 ns
constexpr nanoseconds kPiece = 100ns;   // and a piece has 100 bytes
constexpr nanoseconds kTimeout = 50us;  // after which a lost piece goes out again
constexpr nanoseconds kGiveUp = 10ms;   // on a target that does not answer

class EmulatedFaults : public EmulatedTest {
 protected:
  std::set<uint32_t> numbers_that_arrived(uint32_t rank) const {
    std::set<uint32_t> numbers;
    for (const Told& told : arrivals(rank)) numbers.insert(told.completion.immediate);
    return numbers;
  }
  std::set<uint64_t> numbers_that_failed(uint32_t rank) const {
    std::set<uint64_t> numbers;
    for (const Told& told : errors(rank)) numbers.insert(told.completion.context);
    return numbers;
  }
};

// --- writes
// --------------------------------------------------------------------------------------------------

TEST_F(EmulatedFaults, TheNthWritesFail) {
  start(2);
  network_->inject({.kind = FaultKind::kFailWrites, .rank = 0, .at_post = 3, .writes = 2});
  for (uint32_t number = 1; number <= 6; ++number) post(0, 1, 1'000, number);
  run();
  EXPECT_EQ(numbers_that_failed(0), (std::set<uint64_t>{3, 4}));
  EXPECT_EQ(numbers_that_arrived(1), (std::set<uint32_t>{1, 2, 5, 6}));
  EXPECT_EQ(done(0).size(), 4U);
  EXPECT_NE(errors(0)[0].completion.error.find("EFA status 8"), std::string::npos);
}

TEST_F(EmulatedFaults, WritesOfOneNicFail) {
  profile_.nics = 2;
  start(2);
  network_->inject({.kind = FaultKind::kFailWrites, .rank = 0, .rail = 1, .at_post = 2});
  for (uint32_t number = 1; number <= 6; ++number) post(0, 1, 100, number, number % 2);
  run();
  EXPECT_EQ(numbers_that_failed(0), std::set<uint64_t>{3});
}

// Nothing says how much of a failed write is there.
TEST_F(EmulatedFaults, AFailedWriteMayHaveLandedInPart) {
  start(2);
  std::set<size_t> landed;
  for (uint32_t i = 0; i < 50; ++i) {
    fill(0, std::byte{7});
    fill(1, std::byte{0});
    network_->inject({.kind = FaultKind::kFailWrites, .rank = 0});
    post(0, 1, 1'000);
    run();
    landed.insert(bytes_with(1, std::byte{7}, 1'000));
  }
  EXPECT_EQ(errors(0).size(), 50U);
  EXPECT_TRUE(arrivals(1).empty());
  EXPECT_GT(landed.size(), 5U);
  EXPECT_EQ(*landed.begin(), 0U);
  EXPECT_LT(*landed.rbegin(), 1'000U);
}

TEST_F(EmulatedFaults, AStormLosesEveryPieceSoOften) {
  start(2);
  network_->inject({.kind = FaultKind::kLosePieces, .rank = 0, .at = 0ns, .losses = 3});
  network_->advance();
  post(0, 1, 100);
  run();
  EXPECT_EQ(network_->counters(0).lost_pieces, 3U);
  EXPECT_EQ(arrivals(1).at(0).time, 3 * (kPiece + kLatency + kTimeout) + kPiece + kLatency);
  EXPECT_TRUE(errors(0).empty());
}

TEST_F(EmulatedFaults, AStormLosesAllPiecesOfAllItsWrites) {
  start(2);
  fill(0, std::byte{7});
  network_->inject({.kind = FaultKind::kLosePieces, .rank = 0, .writes = 2, .losses = 254});
  for (uint32_t number = 0; number < 3; ++number) post(0, 1, 1'000, number);
  run();
  EXPECT_EQ(network_->counters(0).lost_pieces, 2 * 10 * 254U);
  EXPECT_EQ(arrivals(1).size(), 3U);
  EXPECT_EQ(arrivals(1)[0].completion.immediate, 2U);
}

TEST_F(EmulatedFaults, PostsAreRefusedForATimeAndThenTheRankIsWoken) {
  profile_.nics = 2;
  start(2);
  network_->inject({.kind = FaultKind::kRefusePosts, .rank = 0, .rail = 1, .at_post = 2, .duration = 300us});
  EXPECT_EQ(post(0, 1, 10, 1, 1), PostResult::kPosted);
  EXPECT_EQ(post(0, 1, 10, 2, 1), PostResult::kPosted);
  EXPECT_EQ(post(0, 1, 10, 3, 1), PostResult::kAgain);
  EXPECT_EQ(post(0, 1, 10, 4, 0), PostResult::kPosted);
  EXPECT_EQ(post(1, 0, 10, 5, 1), PostResult::kPosted);
  run_until(299us);
  EXPECT_EQ(post(0, 1, 10, 3, 1), PostResult::kAgain);
  network_->take_woken();
  ASSERT_TRUE(network_->advance_until_woken());
  EXPECT_EQ(network_->now(), 300us);
  EXPECT_EQ(network_->take_woken(), std::vector<uint32_t>{0});
  EXPECT_EQ(post(0, 1, 10, 3, 1), PostResult::kPosted);
}

TEST_F(EmulatedFaults, PostsAreRefusedForEver) {
  start(2);
  network_->inject({.kind = FaultKind::kRefusePosts, .rank = 0});
  network_->advance_to(1h);
  EXPECT_EQ(post(0, 1, 10), PostResult::kAgain);
  EXPECT_EQ(network_->counters(0).refused, 1U);
}

// --- NICs
// ----------------------------------------------------------------------------------------------------

TEST_F(EmulatedFaults, ALostNicFailsItsWritesAndPostsButNotTheOther) {
  profile_.nics = 2;
  start(2);
  network_->inject({.kind = FaultKind::kLoseNic, .rank = 0, .rail = 1, .at = 6us});
  for (const uint32_t rail : {0u, 1u}) post(0, 1, 10'000, rail, rail);
  run_until(20us);
  EXPECT_EQ(numbers_that_failed(0), std::set<uint64_t>{1});
  EXPECT_EQ(errors(0).at(0).time, 6us);
  EXPECT_EQ(post(0, 1, 10, 3, 1), PostResult::kPosted);
  EXPECT_EQ(post(0, 1, 10, 4, 0), PostResult::kPosted);
  run();
  EXPECT_EQ(numbers_that_failed(0), (std::set<uint64_t>{1, 3}));
  EXPECT_EQ(numbers_that_arrived(1), (std::set<uint32_t>{0, 4}));
  EXPECT_NE(errors(0)[0].completion.error.find("EFA status 1, FLUSHED"), std::string::npos);
}

TEST_F(EmulatedFaults, WritesToALostNicEndWhenTheirDeviceGivesUp) {
  profile_.nics = 2;
  start(2);
  network_->inject({.kind = FaultKind::kLoseNic, .rank = 1, .rail = 1});
  for (const uint32_t rail : {0u, 1u}) post(0, 1, 100, rail, rail);
  run();
  EXPECT_EQ(numbers_that_arrived(1), std::set<uint32_t>{0});
  EXPECT_EQ(numbers_that_failed(0), std::set<uint64_t>{1});
  EXPECT_EQ(errors(0).at(0).time, kPiece + kLatency + kGiveUp);
  EXPECT_NE(error_of(0).find("EFA status 13, UNRESP_REMOTE"), std::string::npos);
}

// A write whose acknowledgement comes too late for its NIC is not reported as complete.
TEST_F(EmulatedFaults, ANicThatIsLostBeforeTheAcknowledgementFailsTheWrite) {
  start(2);
  network_->inject({.kind = FaultKind::kLoseNic, .rank = 0, .at = kLatency + 200ns});
  post(0, 1, 100);
  run();
  EXPECT_EQ(arrivals(1).size(), 1U);
  EXPECT_TRUE(done(0).empty());
  EXPECT_EQ(errors(0).size(), 1U);
}

// --- addresses
// -----------------------------------------------------------------------------------------------

TEST_F(EmulatedFaults, AnInitiatorThatTheTargetDoesNotKnowGetsAnError) {
  start(2);
  memories_.emplace_back(kMemory);
  add(2);
  connect(2, 1);  // but not 1 to 2
  fill(2, std::byte{7});
  post(2, 1, 5'000);
  run();
  EXPECT_NE(error_of(2).find("EFA status 14, REMOTE_UNKNOWN_PEER"), std::string::npos);
  EXPECT_TRUE(arrivals(1).empty());
  EXPECT_EQ(bytes_with(1, std::byte{0}, kMemory), kMemory);
  connect(1, 2);
  post(2, 1, 5'000);
  run();
  EXPECT_EQ(arrivals(1).size(), 1U);
}

// Registering again takes the memory away from writes of the past, in flight or to come, until a new
// connect().
TEST_F(EmulatedFaults, WritesToAnEarlierRegistrationNeverLand) {
  start(2);
  fill(0, std::byte{7});
  post(0, 1, 10'000, 1);
  run_until(kLatency + 5us);
  const size_t landed = bytes_with(1, std::byte{7}, 10'000);
  EXPECT_GT(landed, 1'000U);
  EXPECT_LT(landed, 9'000U);
  fabric(1).register_memory(memory(1), kMemory);
  fill(1, std::byte{0});
  post(0, 1, 10'000, 2);
  run();
  EXPECT_EQ(numbers_that_failed(0), (std::set<uint64_t>{1, 2}));
  EXPECT_NE(errors(0)[0].completion.error.find("EFA status 7, REMOTE_BAD_ADDRESS"), std::string::npos);
  EXPECT_TRUE(arrivals(1).empty());
  EXPECT_EQ(bytes_with(1, std::byte{0}, kMemory), kMemory);
  connect(0, 1);
  post(0, 1, 10'000, 3);
  run();
  EXPECT_EQ(numbers_that_arrived(1), std::set<uint32_t>{3});
}

TEST_F(EmulatedFaults, ANewIncarnationStartsFromNothing) {
  start(2);
  fabrics_[1].reset();
  add(1);
  EXPECT_TRUE(network_->alive(1));
  post(0, 1, 100, 1);  // still the old one's address
  run();
  EXPECT_NE(error_of(0).find("EFA status 9, REMOTE_BAD_DEST_QPN"), std::string::npos);
  connect(0, 1);
  post(0, 1, 100, 2);
  run();
  EXPECT_EQ(errors(0).size(), 2U) << "the new incarnation does not know rank 0";
  connect(1, 0);
  post(0, 1, 100, 3);
  run();
  EXPECT_EQ(numbers_that_arrived(1), std::set<uint32_t>{3});
}

// connect() to the new incarnation ends the old one's right to write here.
TEST_F(EmulatedFaults, AnEarlierIncarnationThatIsStillAliveIsRefused) {
  start(2);
  const std::unique_ptr<EmulatedFabric> zombie = std::move(fabrics_[0]);
  add(0);
  connect(1, 0);
  connect(0, 1);
  EXPECT_EQ(zombie->post_write({.peer = 1, .bytes = 100, .context = 9}), PostResult::kPosted);
  run();
  EXPECT_TRUE(arrivals(1).empty());
  std::array<Completion, 2> completions;
  ASSERT_EQ(zombie->poll(completions), 1U);
  EXPECT_EQ(completions[0].kind, CompletionKind::kError);
  post(0, 1, 100, 1);
  run();
  EXPECT_EQ(numbers_that_arrived(1), std::set<uint32_t>{1});
}

// --- faults as such
// ------------------------------------------------------------------------------------------

TEST_F(EmulatedFaults, AFaultThatMakesNoSenseIsRefused) {
  start(2);
  const auto refused = [&](const Fault& fault) { EXPECT_THROW(network_->inject(fault), ConfigurationError); };
  refused({.kind = FaultKind::kDie, .rank = 7});
  refused({.kind = FaultKind::kLoseNic, .rank = 0, .rail = 1});
  refused({.kind = FaultKind::kDie, .rank = 0, .at = 1us, .at_post = 1});
  refused({.kind = FaultKind::kDie, .rank = 0, .at_post = 0});
  refused({.kind = FaultKind::kLosePieces, .rank = 0, .losses = 255});
  network_->advance_to(1us);
  refused({.kind = FaultKind::kDie, .rank = 0, .at = 999ns});
}

TEST_F(EmulatedFaults, FaultsAreInTheTrace) {
  start(2);
  const uint64_t before = network_->trace_hash();
  network_->inject({.kind = FaultKind::kFreeze, .rank = 1});
  EXPECT_NE(network_->trace_hash(), before);
  EXPECT_EQ(network_->trace().log().back().text(), "0 ps: rank 1 rail 0 fault write 0 (4)");
}

}  // namespace
}  // namespace efa_ep
