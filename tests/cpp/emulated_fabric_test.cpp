// EmulatedFabric keeps the contract of fabric.h, takes its liberties, and repeats itself.
#include "fabric/emulated_fabric.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <string>

#include "emulated_fixture.h"
#include "errors.h"
#include "fabric_suite.h"
#include "self_advancing_fabric.h"

namespace efa_ep {
namespace {

class EmulatedContract : public ::testing::TestWithParam<EmulatedProfile> {};

INSTANTIATE_TEST_SUITE_P(Profiles, EmulatedContract, ::testing::ValuesIn(emulated_profiles()),
                         [](const auto& info) {
                           std::string name = info.param.name;
                           std::erase(name, '-');
                           return name;
                         });

TEST_P(EmulatedContract, EveryWriteArrivesOnceAndComplete) {
  const uint32_t seeds = amount(10, 1000);
  const uint64_t first = test_seed(52);
  for (uint64_t seed = first; seed < first + seeds && !HasFailure(); ++seed) {
    EmulatedNetwork network({.profile = GetParam(), .seed = seed, .check_sources = true});
    testing::AllToAll traffic(3, {0, 1, 63, 64, 65, 4096, 20'000, 0, 7});
    testing::FabricCluster cluster(3, traffic.memory_bytes(), [&](uint32_t rank) {
      return std::make_unique<SelfAdvancingFabric>(network, rank);
    });
    traffic.run(cluster, seed);
    for (uint32_t rank = 0; rank < 3; ++rank) {
      EXPECT_EQ(network.counters(rank).posted, 27U);
      EXPECT_EQ(network.counters(rank).completed, 27U);
      EXPECT_EQ(network.counters(rank).arrived, 27U);
      EXPECT_EQ(network.counters(rank).changed_sources, 0U);
      EXPECT_LE(network.counters(rank).most_in_flight, GetParam().send_queue_depth);
    }
  }
}

/// A storm of writes on the worst network, with one thread's deterministic calls; returns the trace.
std::pair<uint64_t, std::deque<TraceEvent>> storm(uint64_t seed) {
  EmulatedNetwork network({.profile = emulated_profile("hostile"), .seed = seed, .logged_events = 64});
  testing::AllToAll traffic(2, {0, 100, 300});
  testing::FabricCluster cluster(2, traffic.memory_bytes(), [&](uint32_t rank) {
    return std::make_unique<SelfAdvancingFabric>(network, rank);
  });
  traffic.run(cluster, 1);
  return {network.trace_hash(), network.trace().log()};
}

TEST(EmulatedTrace, IsTheSameForTheSameSeedAndAnotherForEveryOther) {
  std::set<uint64_t> hashes;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    const auto [hash, log] = storm(seed);
    EXPECT_TRUE(hashes.insert(hash).second) << "seed " << seed << " repeats another's trace";
    if (seed % 50 != 0) continue;
    const auto [again, log_again] = storm(seed);
    EXPECT_EQ(hash, again) << "seed " << seed;
    EXPECT_EQ(log, log_again) << "seed " << seed;
  }
}

TEST_F(EmulatedTest, PollAndPostDoNotMoveTime) {
  start(2);
  post(0, 1, 100);
  for (int i = 0; i < 100; ++i) poll_all();
  EXPECT_EQ(network_->now(), 0ns);
  EXPECT_TRUE(told_.empty());
  run();
  EXPECT_GT(network_->now(), 0ns);
  EXPECT_EQ(network_->clock().now().time_since_epoch(), network_->now());
  EXPECT_EQ(arrivals(1).size(), 1U);
  EXPECT_EQ(done(0).size(), 1U);
}

// Whoever reads payload before its immediate sees some of it, in no order of addresses.
TEST_F(EmulatedTest, APayloadIsTornUntilItsImmediate) {
  start(2);
  constexpr uint32_t kBytes = 10'000;  // 100 pieces
  fill(0, std::byte{7});
  post(0, 1, kBytes);
  std::vector<size_t> landed_pieces;
  std::vector<bool> seen(100);
  while (arrivals(1).empty()) {
    for (size_t piece = 0; piece < seen.size(); ++piece) {
      if (seen[piece] || memory(1)[piece * 100] != std::byte{7}) continue;
      seen[piece] = true;
      landed_pieces.push_back(piece);
    }
    EXPECT_EQ(bytes_with(1, std::byte{7}, kBytes), landed_pieces.size() * 100);
    ASSERT_TRUE(network_->advance());
    poll_all();
  }
  EXPECT_EQ(bytes_with(1, std::byte{7}, kBytes), kBytes);
  EXPECT_GE(landed_pieces.size(), 99U) << "pieces did not land one by one";
  size_t ascents = 0;
  for (size_t i = 1; i < landed_pieces.size(); ++i) ascents += landed_pieces[i] > landed_pieces[i - 1];
  EXPECT_GT(ascents, 25U);
  EXPECT_LT(ascents, 75U);
}

// A source that is reused too early shows at the target, and is counted.
TEST_F(EmulatedTest, ASourceIsReadUntilItsWriteIsComplete) {
  start(2);
  fill(0, std::byte{7});
  post(0, 1, 10'000);
  run_until(10us);  // 5 us of latency, 5 us of pieces
  const size_t early = bytes_with(1, std::byte{7}, 10'000);
  EXPECT_GT(early, 0U);
  fill(0, std::byte{9});
  run();
  EXPECT_EQ(bytes_with(1, std::byte{7}, 10'000), early);
  EXPECT_EQ(bytes_with(1, std::byte{9}, 10'000), 10'000 - early);
  EXPECT_EQ(network_->counters(0).changed_sources, 1U);
}

// Writes overtake each other between the same two NICs, and a source may learn of its write before the target
// does.
TEST_F(EmulatedTest, NothingIsOrderedWithAnythingElse) {
  profile_ = emulated_profile("hostile");
  profile_.send_queue_depth = 64;
  start(2);
  for (uint32_t number = 0; number < 64; ++number) post(0, 1, 200, number);
  run();
  std::vector<uint32_t> order;
  for (const Told& told : arrivals(1)) order.push_back(told.completion.immediate);
  ASSERT_EQ(order.size(), 64U);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  size_t source_first = 0;
  for (const Told& completed : done(0)) {
    for (const Told& arrived : arrivals(1)) {
      const bool same = arrived.completion.immediate == completed.completion.context;
      source_first += same && completed.time < arrived.time;
    }
  }
  EXPECT_GT(source_first, 0U);
  EXPECT_LT(source_first, 64U);
}

// An 8-byte write overtakes a long one that was posted before it.
TEST_F(EmulatedTest, AShortWriteOvertakesALongOne) {
  start(2);
  post(0, 1, 50'000, 1);
  post(0, 1, 8, 2);
  run();
  ASSERT_EQ(arrivals(1).size(), 2U);
  EXPECT_EQ(arrivals(1)[0].completion.immediate, 2U);
}

TEST_F(EmulatedTest, RefusesWhatTheCallerCouldHaveKnown) {
  start(2);
  EXPECT_THROW(fabric(0).post_write({.peer = 5}), ConfigurationError);
  EXPECT_THROW(fabric(0).post_write({.peer = 1, .rail = 1}), ConfigurationError);
  EXPECT_THROW(fabric(0).post_write({.peer = 1, .bytes = (1 << 20) + 1}), ConfigurationError);
  EXPECT_THROW(fabric(0).post_write({.peer = 1, .local_offset = kMemory - 3, .bytes = 4}),
               ConfigurationError);
  EXPECT_THROW(fabric(0).post_write({.peer = 1, .remote_offset = kMemory - 3, .bytes = 4}),
               ConfigurationError);
  EXPECT_THROW(fabric(0).post_write({.peer = 1, .remote_offset = UINT64_MAX, .bytes = 4}),
               ConfigurationError);
  EXPECT_FALSE(network_->advance());
  EXPECT_EQ(network_->counters(0).posted, 0U);
}

TEST_F(EmulatedTest, ConnectRefusesWhatIsNoAddressOfThisNetwork) {
  start(2);
  std::vector<std::byte> address = fabric(1).address();
  EXPECT_THROW(fabric(0).connect(1, {}), ProtocolError);
  address.push_back(std::byte{0});
  EXPECT_THROW(fabric(0).connect(1, address), ProtocolError);
  address.pop_back();
  for (size_t byte = 0; byte < 16; ++byte) {  // magic and network
    address[byte] ^= std::byte{1};
    EXPECT_THROW(fabric(0).connect(1, address), ProtocolError);
    address[byte] ^= std::byte{1};
  }
  address.back() = std::byte{0xFF};  // endpoint
  EXPECT_THROW(fabric(0).connect(1, address), ProtocolError);
  EmulatedNetwork other({.profile = profile_, .seed = seed_ + 1});
  const EmulatedFabric foreign(other, 1);
  EXPECT_THROW(fabric(0).connect(1, foreign.address()), ProtocolError);
}

TEST(EmulatedProfiles, AreFoundByNameAndChecked) {
  for (const EmulatedProfile& profile : emulated_profiles()) {
    EXPECT_EQ(emulated_profile(profile.name).name, profile.name);
    EXPECT_NO_THROW(require_valid(profile));
  }
  try {
    emulated_profile("p7");
    ADD_FAILURE() << "found p7";
  } catch (const ConfigurationError& error) {
    EXPECT_NE(std::string(error.what()).find("p5, p5en, p6-b200, p6-b300, hostile"), std::string::npos);
  }
  const auto refused = [](auto change) {
    EmulatedProfile profile = plain_profile();
    change(profile);
    EXPECT_THROW(EmulatedNetwork({.profile = profile}), ConfigurationError);
  };
  refused([](EmulatedProfile& profile) { profile.nics = 0; });
  refused([](EmulatedProfile& profile) { profile.bytes_per_second = 0; });
  refused([](EmulatedProfile& profile) { profile.mtu = 0; });
  refused([](EmulatedProfile& profile) { profile.max_write_bytes = uint64_t{1} << 32; });
  refused([](EmulatedProfile& profile) { profile.interleaved_writes = 0; });
  refused([](EmulatedProfile& profile) { profile.send_queue_depth = 0; });
  refused([](EmulatedProfile& profile) { profile.completion_queue_depth = 0; });
  refused([](EmulatedProfile& profile) { profile.lost_pieces_per_million = 1'000'000; });
  refused([](EmulatedProfile& profile) { profile.latency = -1ns; });
}

}  // namespace
}  // namespace efa_ep
