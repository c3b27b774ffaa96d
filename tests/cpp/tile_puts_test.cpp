// Tile puts on a network that disorders everything: a reader that sees a group's signal sees all its bytes,
// with every signal policy, many producers and readers in threads of their own; fences are as many as the
// published formulas say; and what cannot be right is refused by name.
#include "proxy/tile_puts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "libfabric_testing.h"
#include "tile_world.h"

namespace efa_ep {
namespace {

using ::efa_ep::testing::contains;
using ::efa_ep::testing::message_of;
using ::testing::ValuesIn;

TEST(TilePut, CarriesEveryBit) {
  const std::vector<TilePut> puts = {{.peer = 0, .group = 0, .transfers = 1},
                                     {.peer = 1023,
                                      .group = 255,
                                      .transfers = 4095,
                                      .bytes = kMaxTileBytes,
                                      .local_offset = (uint64_t{1} << 49) - 16,
                                      .remote_offset = kMaxTileReach - 16},
                                     {.peer = 1023},
                                     {.group = 255},
                                     {.transfers = 4095},
                                     {.bytes = kMaxTileBytes},
                                     {.local_offset = (uint64_t{1} << 49) - 16},
                                     {.remote_offset = kMaxTileReach - 16}};
  for (const TilePut& put : puts) {
    EXPECT_EQ(put.encode()[0] & 1, 0u) << "the ring's bit";
    EXPECT_EQ(TilePut::decode(put.encode()), put);
    Ring<TilePut> ring(1);
    TilePut popped;
    ASSERT_TRUE(ring.try_push(put) && ring.try_pop(popped));
    EXPECT_EQ(popped, put);
  }
}

TEST(TileImmediate, CarriesEveryBitAndDiffersFromThoseOfRounds) {
  for (const TileImmediate& immediate :
       {TileImmediate{}, TileImmediate{1023, 1, 255, 4095}, TileImmediate{.source = 1023},
        TileImmediate{.generation = 1}, TileImmediate{.group = 255}, TileImmediate{.writes = 4095}}) {
    EXPECT_EQ(TileImmediate::decode(immediate.encode()), immediate);
    EXPECT_TRUE(TileImmediate::is_one(immediate.encode()));
  }
}

class TilePutsWith : public ::testing::TestWithParam<SignalPolicyKind> {};
INSTANTIATE_TEST_SUITE_P(EveryPolicy, TilePutsWith, ValuesIn(kSignalPolicies),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(TilePutsWith, AReaderThatSeesTheSignalSeesAllBytes) {
  for (uint32_t turn = 0; turn < amount(4, 60) && !HasFailure(); ++turn) {
    TileWorld::Options options;
    options.seed = test_seed(1) + turn;
    options.policy = GetParam();
    options.ranks = 2 + turn % 3;
    options.rails = 1 + turn % 2;
    options.chunk_bytes = turn % 4 == 3 ? 100'000 : 512;
    SCOPED_TRACE(::testing::Message() << "TEST_SEED=" << options.seed - turn << ", turn " << turn);
    TileWorld world(options);
    Exchange(world, /*producers=*/1 + turn % 4, /*generations=*/5).run();
  }
}

// Signals that are due when their group ends must not keep the window full that its end waits for.
TEST_P(TilePutsWith, AGroupMayHaveMoreWritesThanTheWindow) {
  for (const uint32_t window : {1u, 3u}) {
    TileWorld::Options options;
    options.seed = test_seed(2);
    options.policy = GetParam();
    options.ranks = 3;
    options.chunk_bytes = 64;
    options.completion_queue_depth = options.send_queue_depth + 2 * window * (options.ranks - 1);
    SCOPED_TRACE(::testing::Message() << "TEST_SEED=" << options.seed << ", window " << window);
    TileWorld world(options);
    Exchange(world, /*producers=*/2, /*generations=*/2).run();
    for (uint32_t rank = 0; rank < options.ranks; ++rank) {
      EXPECT_GT(world.tiles(rank).counters().waits, 0u) << "the window was never full";
    }
  }
}

/// Rank 0 does nothing, while all others put a group of so many writes there, and do all their work.
void put_to_a_rank_that_does_not_poll(TileWorld& world, uint32_t writes) {
  const uint32_t ranks = world.options().ranks;
  for (uint32_t source = 1; source < ranks; ++source) {
    for (uint32_t write = 0; write < writes; ++write) {
      const uint64_t at = uint64_t{kTileAlignment} * write;
      ASSERT_TRUE(world.tiles(source).try_submit({.peer = 0,
                                                  .group = write % 2,
                                                  .transfers = (writes + 1 - write % 2) / 2,
                                                  .bytes = kTileAlignment,
                                                  .local_offset = world.sent_at(0, 0) + at,
                                                  .remote_offset = world.received_at(source, 0) + at}));
    }
  }
  const Patience patience;
  const auto is_busy = [&] {
    for (uint32_t source = 1; source < ranks; ++source) {
      if (!world.tiles(source).idle()) return true;
    }
    return false;
  };
  while (is_busy()) {
    for (uint32_t source = 1; source < ranks; ++source) world.tiles(source).drive();
    patience.check();
  }
}

TileWorld::Options one_nic_without_room_to_spare() {
  TileWorld::Options options;
  options.ranks = 4;
  options.rails = 1;
  options.groups = 2;
  options.ring_commands = 128;
  options.completion_queue_depth = options.send_queue_depth + 2 * 20 * (options.ranks - 1);
  options.overrun_room = 0;
  options.seed = test_seed(3);
  return options;
}

TEST(TilePutsWindow, GroupsWithinItNeedNoTargetThatPolls) {
  TileWorld world(one_nic_without_room_to_spare());
  ASSERT_EQ(world.tiles(0).window(), 20u);
  put_to_a_rank_that_does_not_poll(world, world.tiles(0).window());
  const Patience patience;
  while (world.tiles(0).counters().signals < 2 * (world.options().ranks - 1)) {
    world.tiles(0).drive();
    patience.check();
  }
}

// Half of the queue is the rounds', so tile puts alone overrun it with twice the window.
TEST(TilePutsWindow, GroupsBeyondItOverrunATargetThatDoesNotPoll) {
  TileWorld world(one_nic_without_room_to_spare());
  const uint32_t writes = 2 * world.tiles(0).window() + world.options().send_queue_depth;
  const std::string message =
      message_of<std::logic_error>([&] { put_to_a_rank_that_does_not_poll(world, writes); });
  EXPECT_TRUE(contains(message, "overrun")) << message;
}

// The counts of Perseus (arXiv 2605.00686): (P - P_local) E/P concurrent transfers per dispatch of a rank,
// each fenced if coupled, P - P_local fences if one group per remote rank is decoupled.
struct Model {
  uint32_t ranks, ranks_per_node, experts;
};
class FenceCount : public ::testing::TestWithParam<Model> {};
INSTANTIATE_TEST_SUITE_P(Published, FenceCount,
                         ::testing::Values(Model{16, 4, 128}, Model{32, 4, 128}, Model{64, 8, 256}),
                         [](const auto& info) {
                           return std::to_string(info.param.experts) + "experts_" +
                                  std::to_string(info.param.ranks) + "ranks";
                         });

TEST_P(FenceCount, IsAsPublished) {
  const auto [ranks, ranks_per_node, experts] = GetParam();
  const uint32_t experts_per_rank = experts / ranks;
  const uint32_t remote_ranks = ranks - ranks_per_node;
  for (const SignalPolicyKind kind : kSignalPolicies) {
    TileWorld world({.ranks = ranks,
                     .rails = 1,
                     .groups = 1,
                     .group_bytes = uint64_t{64} * experts_per_rank,
                     .ring_commands = 512,
                     .policy = kind});
    for (uint32_t peer = ranks_per_node; peer < ranks; ++peer) {
      for (uint32_t expert = 0; expert < experts_per_rank; ++expert) {
        ASSERT_TRUE(world.tiles(0).try_submit({.peer = peer,
                                               .transfers = experts_per_rank,
                                               .bytes = 64,
                                               .local_offset = world.sent_at(peer, 0) + 64 * expert,
                                               .remote_offset = world.received_at(0, 0) + 64 * expert}));
      }
    }
    const Patience patience;
    while (!world.tiles(0).idle()) {
      world.tiles(0).drive();
      patience.check();
    }
    const uint64_t transfers = uint64_t{remote_ranks} * experts_per_rank;
    const SignalCounters got = world.policy(0).counters();
    const bool waits = kind == SignalPolicyKind::kCoupled || kind == SignalPolicyKind::kDecoupled;
    EXPECT_EQ(got.fences, kind == SignalPolicyKind::kCounted   ? 0
                          : kind == SignalPolicyKind::kCoupled ? transfers
                                                               : remote_ranks)
        << name_of(kind);
    EXPECT_EQ(got.signals, kind == SignalPolicyKind::kCounted ? 0 : transfers) << name_of(kind);
    EXPECT_EQ(got.waits > 0, waits) << name_of(kind);
    EXPECT_EQ(world.tiles(0).counters().writes, transfers) << name_of(kind);
    EXPECT_EQ(world.network().traffic(0).writes, transfers + got.signals) << name_of(kind);
  }
}

TEST(FenceCountFormula, EightTimesFewerFor128ExpertsOn16Ranks) {
  constexpr uint32_t kCoupled = (16 - 4) * (128 / 16);
  constexpr uint32_t kDecoupled = 16 - 4;
  EXPECT_EQ(kCoupled, 8 * kDecoupled);
}

// ---- writes: how transfers are cut, spread and counted

TEST(TilePutsCut, LongTransfersGoOverAllNics) {
  TileWorld world({.ranks = 2, .rails = 2, .groups = 1, .group_bytes = 4096, .chunk_bytes = 1000});
  std::vector<std::pair<uint32_t, uint32_t>> writes;  // rail, bytes
  world.network().set_rule([&](uint32_t, const WriteRequest& request) {
    writes.emplace_back(request.rail, request.bytes);
    return LoopbackNetwork::Fault::kNone;
  });
  ASSERT_TRUE(
      world.tiles(0).try_submit({.peer = 1, .bytes = 4096, .remote_offset = world.received_at(0, 0)}));
  world.tiles(0).work();
  std::sort(writes.begin(), writes.end());
  EXPECT_EQ(writes, (std::vector<std::pair<uint32_t, uint32_t>>{
                        {0, 96}, {0, 1000}, {0, 1000}, {1, 1000}, {1, 1000}}));
}

// ---- refusals

class TilePutsRefuse : public ::testing::Test {
 protected:
  void refuses(const TilePut& put, const std::string& part) {
    const std::string message = message_of<ConfigurationError>([&] { world_.tiles(0).try_submit(put); });
    EXPECT_TRUE(contains(message, part)) << message;
  }
  /// The message of the error that these immediates end in, written by rank 1 to rank 0.
  std::string arriving(const std::vector<TileImmediate>& immediates) {
    return message_of<ProtocolError>([&] {
      for (const TileImmediate& immediate : immediates) {
        EXPECT_EQ(world_.network().endpoint(1).post_write({.peer = 0, .immediate = immediate.encode()}),
                  PostResult::kPosted);
        const Patience patience;
        const uint64_t before = world_.network().traffic(0).arrivals;
        while (world_.network().traffic(0).arrivals == before) {
          world_.tiles(0).drive();
          patience.check();
        }
      }
    });
  }

  TileWorld world_{{.send_queue_depth = 100}};
};

TEST_F(TilePutsRefuse, PutsThatCannotBeRight) {
  const TilePut good{.peer = 1, .group = 2, .transfers = 1, .bytes = 16};
  const auto with = [&](auto change) {
    TilePut put = good;
    change(put);
    return put;
  };
  refuses(with([](TilePut& put) { put.peer = 3; }), "rank 3");
  refuses(with([](TilePut& put) { put.peer = 0; }), "to rank 0 from rank 0");
  refuses(with([](TilePut& put) { put.group = 3; }), "group is 3, the limit is 2");
  refuses(with([](TilePut& put) { put.transfers = 0; }), "0 transfers");
  refuses(with([](TilePut& put) { put.transfers = 4096; }), "4096, the limit is 4095");
  refuses(with([](TilePut& put) { put.bytes = kMaxTileBytes + 16; }), "the limit is 4194304");
  refuses(with([](TilePut& put) { put.bytes = 8; }), "multiples of 16");
  refuses(with([](TilePut& put) { put.local_offset = 8; }), "multiples of 16");
  refuses(with([](TilePut& put) { put.remote_offset = kMaxTileReach; }), "remote offset");
  EXPECT_TRUE(world_.tiles(0).try_submit(good));
}

TEST_F(TilePutsRefuse, GroupsThatDisagreeWithThemselves) {
  ASSERT_TRUE(world_.tiles(0).try_submit({.peer = 1, .transfers = 3, .bytes = 16}));
  ASSERT_TRUE(world_.tiles(0).try_submit({.peer = 1, .transfers = 2, .bytes = 16}));
  const std::string message = message_of<ConfigurationError>([&] { world_.tiles(0).work(); });
  EXPECT_TRUE(contains(message, "group 0 to rank 1 has 3 transfers")) << message;
}

TEST_F(TilePutsRefuse, ArrivalsThatNoPeerOfThisRunSends) {
  EXPECT_TRUE(contains(arriving({{.source = 9}}), "names no other rank"));
  EXPECT_TRUE(contains(arriving({{.source = 0}}), "names no other rank"));
  EXPECT_TRUE(contains(arriving({{.source = 1, .group = 3}}), "names no group"));
  EXPECT_TRUE(contains(arriving({{.source = 1, .generation = 1}}), "another use of the group"));
  EXPECT_TRUE(
      contains(arriving({{.source = 1, .group = 0, .writes = 3}, {.source = 1, .writes = 3}}), "twice"));
  EXPECT_TRUE(contains(
      arriving(
          {{.source = 2, .group = 1}, {.source = 2, .group = 1}, {.source = 2, .group = 1, .writes = 2}}),
      "one more write than announced"));
}

TEST(TilePutsOptions, AreChecked) {
  LoopbackNetwork network({});
  std::vector<uint64_t> words(11);
  const auto refusal = [&](const TilePutOptions& options) {
    return message_of<ConfigurationError>([&] { TilePuts(network.endpoint(0), words, options); });
  };
  EXPECT_TRUE(contains(refusal({.ranks = 1025}), "1025, the limit is 1024"));
  EXPECT_TRUE(contains(refusal({.ranks = 2, .groups = 257}), "257, the limit is 256"));
  EXPECT_TRUE(contains(refusal({.rank = 2, .ranks = 2}), "rank 2 of 2"));
  EXPECT_TRUE(contains(refusal({.ranks = 2, .groups = 3}), "11 words; pass 12"));
  EXPECT_TRUE(contains(refusal({.ranks = 2, .chunk_bytes = 0}), "chunks of 0 bytes"));
  EXPECT_TRUE(contains(refusal({.ranks = 600}), "completion queues of 1024 have no room"));
}

TEST(TilePutsFailure, AFailedWriteNamesThePeer) {
  TileWorld world({});
  world.network().set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
  ASSERT_TRUE(world.tiles(0).try_submit({.peer = 2, .bytes = 16}));
  const std::string message = message_of<TransportError>([&] {
    const Patience patience;
    while (true) {
      world.tiles(0).drive();
      patience.check();
    }
  });
  EXPECT_TRUE(contains(message, "rank 2")) << message;
}

}  // namespace
}  // namespace efa_ep
