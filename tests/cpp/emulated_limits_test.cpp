// Times and limits of the emulated network, against numbers that follow from the profile by arithmetic alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "emulated_fixture.h"
#include "errors.h"

namespace efa_ep {
namespace {

using std::chrono::nanoseconds;

constexpr nanoseconds kLatency = 5us;  // of plain_profile(), where a byte takes 1 ns

class EmulatedLimits : public EmulatedTest {
 protected:
  /// When the last immediate arrived at a rank.
  nanoseconds last_arrival(uint32_t rank) const {
    nanoseconds last{};
    for (const Told& told : arrivals(rank)) last = std::max(last, told.time);
    return last;
  }
};

TEST_F(EmulatedLimits, ALoneWriteTakesItsLatencyAndItsBytes) {
  for (const uint32_t bytes : {0u, 1u, 99u, 100u, 101u, 5'000u, 65'536u}) {
    start(2);
    post(0, 1, bytes);
    run();
    ASSERT_EQ(arrivals(1).size(), 1U);
    ASSERT_EQ(done(0).size(), 1U);
    EXPECT_EQ(arrivals(1)[0].time, kLatency + nanoseconds(bytes));
    EXPECT_EQ(done(0)[0].time, 2 * kLatency + nanoseconds(bytes));
  }
}

// 45 KB over one NIC of each instance type, from the numbers in its data sheet.
TEST_F(EmulatedLimits, ProfilesHaveTheirBandwidth) {
  for (const auto& [name, gigabytes, latency_us] : std::vector<std::tuple<std::string, double, double>>{
           {"p5", 12.125, 18.35}, {"p5en", 23.625, 10}, {"p6-b200", 37.75, 10}, {"p6-b300", 48.75, 10}}) {
    profile_ = emulated_profile(name);
    profile_.jitter = 0ns;
    start(2);
    post(0, 1, 45'000);
    run();
    EXPECT_NEAR(static_cast<double>(arrivals(1).at(0).time.count()), latency_us * 1000 + 45'000 / gigabytes,
                1)
        << name;
  }
}

TEST_F(EmulatedLimits, SeveralNicsAddUp) {
  profile_.nics = 4;
  start(2);
  for (uint32_t rail = 0; rail < 4; ++rail) post(0, 1, 10'000, rail, rail);
  run();
  EXPECT_EQ(arrivals(1).size(), 4U);
  EXPECT_EQ(last_arrival(1), kLatency + 10us);
}

TEST_F(EmulatedLimits, OneSendingNicIsSharedByItsTargets) {
  start(6);
  for (uint32_t target = 1; target < 6; ++target) post(0, target, 10'000);
  run();
  nanoseconds last{};
  for (uint32_t target = 1; target < 6; ++target) last = std::max(last, last_arrival(target));
  EXPECT_EQ(last, kLatency + 50us);
}

TEST_F(EmulatedLimits, OneReceivingNicIsSharedByItsSenders) {
  for (const uint32_t senders : {1u, 2u, 5u, 15u}) {
    start(senders + 1);
    for (uint32_t sender = 1; sender <= senders; ++sender) post(sender, 0, 10'000);
    run();
    EXPECT_EQ(arrivals(0).size(), senders);
    EXPECT_EQ(last_arrival(0), kLatency + senders * 10us);
  }
}

// Senders that choose different NICs of one receiver do not meet.
TEST_F(EmulatedLimits, IncastIsPerNic) {
  profile_.nics = 2;
  start(5);
  for (uint32_t sender = 1; sender < 5; ++sender) post(sender, 0, 10'000, 0, sender % 2);
  run();
  EXPECT_EQ(last_arrival(0), kLatency + 2 * 10us);
}

TEST_F(EmulatedLimits, ANicStartsNoMoreWorkRequestsThanItsRate) {
  profile_.work_request_interval = 700ns;
  start(2);
  for (uint32_t number = 0; number < 50; ++number) post(0, 1, 0, number);
  run();
  ASSERT_EQ(arrivals(1).size(), 50U);
  for (uint32_t number = 0; number < 50; ++number) {
    EXPECT_EQ(arrivals(1)[number].time, kLatency + number * 700ns);
  }
}

// Small writes are limited by their rate, large ones by their bytes.
TEST_F(EmulatedLimits, TheScarcerOfRateAndBandwidthDecides) {
  profile_.work_request_interval = 700ns;
  for (const auto& [bytes, expected] :
       std::vector<std::pair<uint32_t, nanoseconds>>{{100, 49 * 700ns + 100ns}, {7'000, 50 * 7'000ns}}) {
    start(2);
    for (uint32_t number = 0; number < 50; ++number) post(0, 1, bytes, number);
    run();
    EXPECT_EQ(last_arrival(1), kLatency + expected) << bytes;
  }
}

TEST_F(EmulatedLimits, JitterDelaysByAtMostItself) {
  profile_.jitter = 3us;
  nanoseconds least = 1h, most{};
  for (uint32_t i = 0; i < 200; ++i) {
    start(2, seed_ + i);
    post(0, 1, 0);
    run();
    least = std::min(least, arrivals(1).at(0).time);
    most = std::max(most, arrivals(1).at(0).time);
  }
  // One on the way, one until the completion is there.
  EXPECT_GE(least, kLatency);
  EXPECT_LE(most, kLatency + 2 * 3us);
  EXPECT_LT(least, kLatency + 1us);
  EXPECT_GT(most, kLatency + 5us);
}

TEST_F(EmulatedLimits, LostPiecesComeAgainAfterATimeout) {
  profile_.lost_pieces_per_million = 300'000;
  start(2);
  fill(0, std::byte{7});
  post(0, 1, 20'000);
  run();
  ASSERT_EQ(arrivals(1).size(), 1U);
  EXPECT_EQ(bytes_with(1, std::byte{7}, 20'000), 20'000U);
  // 200 pieces, 0.43 losses each: 86 with a deviation of 11.
  EXPECT_GT(network_->counters(0).lost_pieces, 40U);
  EXPECT_LT(network_->counters(0).lost_pieces, 140U);
  EXPECT_GT(last_arrival(1), kLatency + 20us + 50us);
}

// Only poll() makes room in a send queue, and each NIC has its own.
TEST_F(EmulatedLimits, AFullSendQueueAnswersAgain) {
  profile_.nics = 2;
  profile_.send_queue_depth = 5;
  start(2);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(post(0, 1, 10), PostResult::kPosted);
  EXPECT_EQ(post(0, 1, 10), PostResult::kAgain);
  EXPECT_EQ(post(0, 1, 10, 1, 1), PostResult::kPosted);
  while (network_->advance()) continue;
  EXPECT_EQ(post(0, 1, 10), PostResult::kAgain) << "completions that nobody polled made room";
  std::array<Completion, 1> one;
  while (done(0).empty()) {  // until a completion of NIC 0 is polled
    ASSERT_EQ(fabric(0).poll(one), 1U);
    if (one[0].context == 0) told_.push_back({0, network_->now(), one[0]});
  }
  EXPECT_EQ(post(0, 1, 10), PostResult::kPosted);
  EXPECT_EQ(post(0, 1, 10), PostResult::kAgain);
  EXPECT_EQ(network_->counters(0).most_in_flight, 5U);
}

// A completion queue holds what it holds. One more, and its NIC is lost.
TEST_F(EmulatedLimits, AnOverrunCompletionQueueIsAnError) {
  profile_.completion_queue_depth = 10;
  start(3);
  for (int i = 0; i < 10; ++i) post(0, 1, 10);
  while (network_->advance()) continue;
  poll_all();
  EXPECT_EQ(arrivals(1).size(), 10U);
  EXPECT_EQ(network_->counters(1).most_unpolled, 10U);

  for (const uint32_t source : {0u, 2u}) {
    for (int i = 0; i < 6; ++i) post(source, 1, 10);
  }
  while (network_->advance()) continue;
  std::array<Completion, 64> completions;
  EXPECT_EQ(fabric(1).poll(completions), 10U);
  for (int i = 0; i < 2; ++i) {
    try {
      fabric(1).poll(completions);
      ADD_FAILURE() << "overrun unnoticed";
    } catch (const TransportError& error) {
      EXPECT_NE(std::string(error.what()).find("overrun"), std::string::npos) << error.what();
    }
  }
}

// Own completions take room in the same queue as arrivals.
TEST_F(EmulatedLimits, OwnCompletionsCanOverrunToo) {
  profile_.completion_queue_depth = 10;
  start(2);
  for (int i = 0; i < 6; ++i) {
    post(0, 1, 10);
    post(1, 0, 10);
  }
  while (network_->advance()) continue;
  std::array<Completion, 64> completions;
  for (const uint32_t rank : {0u, 1u}) {
    const size_t count = fabric(rank).poll(completions);
    const auto failed = std::count_if(completions.begin(), completions.begin() + count,
                                      [](const auto& entry) { return entry.kind == CompletionKind::kError; });
    EXPECT_EQ(count - failed, 10U);
    EXPECT_EQ(failed, 1) << "the write that was not acknowledged yet";
    EXPECT_THROW(fabric(rank).poll(completions), TransportError);
  }
}

// All NICs of a rank get their turn, however small the caller's array and however busy one NIC.
TEST_F(EmulatedLimits, PollStarvesNoNic) {
  profile_.nics = 3;
  start(2);
  for (int i = 0; i < 30; ++i) post(0, 1, 10, 0, 0);
  post(0, 1, 10, 1, 1);
  post(0, 1, 10, 2, 2);
  while (network_->advance()) continue;
  std::array<Completion, 1> one;
  std::set<uint32_t> seen;
  for (int polls = 0; polls < 6; ++polls) {
    ASSERT_EQ(fabric(1).poll(one), 1U);
    seen.insert(one[0].immediate);
  }
  EXPECT_EQ(seen, (std::set<uint32_t>{0, 1, 2}));
}

TEST_F(EmulatedLimits, RanksAreWokenByWhatTheyCanPoll) {
  start(3);
  post(0, 1, 10);
  ASSERT_TRUE(network_->advance_until_woken());
  EXPECT_EQ(network_->now(), kLatency + 10ns);
  EXPECT_EQ(network_->take_woken(), std::vector<uint32_t>{1});
  ASSERT_TRUE(network_->advance_until_woken());
  EXPECT_EQ(network_->now(), 2 * kLatency + 10ns);
  EXPECT_EQ(network_->take_woken(), std::vector<uint32_t>{0});
  EXPECT_FALSE(network_->advance_until_woken());
  post(0, 1, 10);
  EXPECT_FALSE(network_->advance_until_woken(12us));
  EXPECT_LE(network_->now(), 12us);
  EXPECT_TRUE(network_->advance_until_woken(1s));
  network_->advance_to(1s);
  EXPECT_EQ(network_->now(), 1s);
  network_->advance_to(1ms);
  EXPECT_EQ(network_->now(), 1s) << "time went back";
}

}  // namespace
}  // namespace efa_ep
