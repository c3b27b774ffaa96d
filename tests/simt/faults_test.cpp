// What the kernels say when something is wrong: the fault, the half, the round, the rank. They never hang,
// trap or send nonsense, and an instance that failed stays silent.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "cuda_world.h"
#include "small_world.h"

namespace efa_ep {
namespace {

using cuda::DeviceError;
using cuda::Fault;

constexpr uint64_t kShortNs = 200'000'000;

CudaRank::Options impatient() {
  CudaRank::Options options;
  options.timeout_ns = kShortNs;
  return options;
}

TEST(Faults, ASourceThatNeverSendsIsNamed) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, impatient());
  const auto round = Planner(config).plan();
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).dispatch_recv(0);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error(), (DeviceError{.fault = Fault::kTimeout,
                                                .half = Half::kDispatchRecv,
                                                .channel = 0,
                                                .rank = 1,
                                                .round = 1,
                                                .detail = 0}));
}

TEST(Faults, ARailPeerThatNeverSendsIsNamed) {
  const WorldConfig config = small_config(3, 1);
  CudaWorld world(config, impatient());
  const auto round = Planner(config).plan();
  for (const uint32_t rank : {0u, 2u}) world.rank(rank).dispatch_send(0, round[rank]);
  world.rank(0).dispatch_recv(0);
  world.rank(0).sync();
  world.rank(2).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kTimeout);
  EXPECT_EQ(world.rank(0).error().rank, 1u);
}

// It has all rows, but its NIC never says so: what waits is the next use of the staged rows.
TEST(Faults, ARailPeerThatNeverConfirmsIsNamed) {
  const WorldConfig config = small_config(3, 1);
  CudaWorld world(config, impatient());
  world.world().network().set_rule([](uint32_t source, const WriteRequest& write) {
    return source == 0 && write.peer == 2 ? LoopbackNetwork::Fault::kNeverComplete
                                          : LoopbackNetwork::Fault::kNone;
  });
  const auto round = Planner(config).plan();
  for (uint32_t rank = 0; rank < 3; ++rank) {
    world.rank(rank).dispatch_send(0, round[rank]);
    world.rank(rank).dispatch_recv(0);
    world.rank(rank).combine_send(0);
    world.rank(rank).combine_recv(0);
  }
  for (uint32_t rank = 0; rank < 3; ++rank) world.rank(rank).sync();
  try {
    world.rank(0).throw_if_failed();
    ADD_FAILURE() << "nothing was missed";
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.missing, std::vector<uint32_t>{2}) << error.what();
  }
}

// A rank that takes nothing keeps writes to it in the queues, and what stands behind them waits, too. The
// kernel names one rank of which nothing came; it may be alive.
TEST(Faults, ARankThatFillsTheQueuesIsNamedBesideThoseBehindIt) {
  const WorldConfig config = small_config(3, 1);
  CudaWorld world(config, impatient());
  world.world().network().set_rule(
      [](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kRefuse; });
  const auto round = Planner(config).plan();
  for (const uint32_t rank : {1u, 2u}) {
    world.rank(rank).dispatch_send(0, round[rank]);
    world.rank(rank).dispatch_recv(0);
  }
  for (const uint32_t rank : {1u, 2u}) world.rank(rank).sync();
  for (const uint32_t rank : {1u, 2u}) {
    try {
      world.rank(rank).throw_if_failed();
      ADD_FAILURE() << "nothing was missed";
    } catch (const RankTimeoutError& error) {
      EXPECT_EQ(error.missing, (std::vector<uint32_t>{0, 3 - rank})) << error.what();
    }
  }
}

TEST(Faults, AnOwnerThatNeverAnswersIsNamedByItsRound) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, impatient());
  const auto round = Planner(config).plan();
  for (const uint32_t rank : {0u, 1u}) world.rank(rank).dispatch_send(0, round[rank]);
  for (const uint32_t rank : {0u, 1u}) world.rank(rank).dispatch_recv(0);
  world.rank(0).combine_send(0);
  world.rank(0).combine_recv(0);
  for (const uint32_t rank : {0u, 1u}) world.rank(rank).sync();
  EXPECT_EQ(world.rank(1).error(), DeviceError{});
  EXPECT_EQ(world.rank(0).error(), (DeviceError{.fault = Fault::kTimeout,
                                                .half = Half::kCombineRecv,
                                                .channel = 0,
                                                .rank = 1,
                                                .round = 1,
                                                .detail = 0}));
}

TEST(Faults, AnIdOutOfRangeSendsNothing) {
  for (const int64_t bad : {int64_t{-2}, int64_t{2}, int64_t{1} << 32}) {
    WorldConfig config = small_config(2, 1);
    config.ids_are_64_bit = true;
    CudaWorld world(config, impatient());
    auto round = Planner(config).plan();
    RankRound& mine = round[0];
    mine.tokens = 1;
    mine.ids = {0, bad};
    mine.weights = {1.0f, 1.0f};
    mine.x.resize(config.layout.row.payload_bytes);
    world.rank(0).dispatch_send(0, mine);
    world.rank(0).sync();
    EXPECT_EQ(world.rank(0).error().fault, Fault::kExpertId);
    EXPECT_EQ(world.rank(0).error().half, Half::kDispatchSend);
    EXPECT_EQ(world.rank(0).error().detail, bad);
    EXPECT_EQ(world.world().proxy(0)->counters().writes, 0u);
  }
}

TEST(Faults, TooManyTokensSendNothing) {
  const WorldConfig config = small_config(2, 1);
  CudaRank::Options options = impatient();
  options.tokens_on_device = true;
  CudaWorld world(config, options);
  RankRound round;
  round.tokens = kMaxTokens + 1;
  world.rank(0).dispatch_send(0, round);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kTooManyTokens);
  EXPECT_EQ(world.rank(0).error().detail, kMaxTokens + 1);
  EXPECT_EQ(world.world().proxy(0)->counters().writes, 0u);
}

TEST(Faults, TheHostCanEndAWait) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, {});
  const auto round = Planner(config).plan();
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).dispatch_recv(0);
  world.rank(0).stop();
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kStopped);
}

TEST(Faults, AFailedInstanceSendsAndWritesNothingMore) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, impatient());
  const auto round = Planner(config).plan();
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).dispatch_recv(0);
  world.rank(0).sync();
  const DeviceError first = world.rank(0).error();
  ASSERT_EQ(first.fault, Fault::kTimeout);
  const Bytes before(world.world().arena(1), world.world().arena(1) + config.layout.total_bytes());
  world.rank(0).combine_send(0);
  world.rank(0).combine_recv(0);
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error(), first);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), world.world().arena(1)));
}

// A peer's words become addresses, so they are checked.
TEST(Faults, AListThatNamesNoRowIsRefused) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, impatient());
  const Layout& layout = config.layout;
  const auto round = Planner(config).plan();
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).sync();
  const uint32_t beyond = layout.topology.nodes() * layout.max_tokens;
  std::memcpy(world.world().arena(1) + layout.row_list(0, 0, 0), &beyond, sizeof beyond);
  const uint64_t flag = RoundWord{1, 1}.encode();
  std::memcpy(world.world().arena(0) + layout.dispatch_flag(0, layout.block(0, 0, 1)), &flag, sizeof flag);
  world.rank(0).dispatch_recv(0);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kRowNumber);
  EXPECT_EQ(world.rank(0).error().rank, 1u);
  EXPECT_EQ(world.rank(0).error().detail, beyond);
}

TEST(Faults, MoreRowsThanARankMaySendAreRefused) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, impatient());
  const Layout& layout = config.layout;
  const auto round = Planner(config).plan();
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).sync();
  const uint64_t flag = RoundWord{1, layout.max_tokens + 1}.encode();
  std::memcpy(world.world().arena(0) + layout.dispatch_flag(0, layout.block(0, 0, 1)), &flag, sizeof flag);
  world.rank(0).dispatch_recv(0);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kRowCount);
  EXPECT_EQ(world.rank(0).error().rank, 1u);
}

TEST(Faults, MoreRowsThanASlotHasAreRefused) {
  const WorldConfig config = small_config(2, 1);
  CudaWorld world(config, impatient());
  const Layout& layout = config.layout;
  const auto round = Planner(config).plan();
  world.rank(0).dispatch_send(0, round[0]);
  world.rank(0).sync();
  const uint64_t word = RoundWord{1, layout.max_tokens + 1}.encode();
  std::memcpy(world.world().arena(0) + layout.arrival(0, Operation::kDispatch, 1), &word, sizeof word);
  world.rank(0).dispatch_recv(0);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kRowCount);
  EXPECT_EQ(world.rank(0).error().rank, 1u);
  EXPECT_EQ(world.rank(0).error().detail, layout.max_tokens + 1);
}

// The first expert that does not exist, in a row from another node, whose sender is named, and in one from
// the own.
TEST(Faults, ARowThatNamesNoExpertIsRefused) {
  for (const uint32_t nodes : {2u, 1u}) {
    const WorldConfig config = small_config(nodes, 2 / nodes);
    CudaWorld world(config, impatient());
    const Layout& layout = config.layout;
    auto round = Planner(config).plan();
    // The row is written out before its ids are looked at, and no plan has it.
    round[0].received_x.resize(config.world() * layout.max_tokens * layout.row.payload_bytes);
    round[0].received_ids.resize(config.world() * layout.max_tokens * kTopK);
    round[0].received_weights.resize(round[0].received_ids.size());
    world.rank(0).dispatch_send(0, round[0]);
    world.rank(0).sync();
    const int32_t ids[kTopK] = {static_cast<int32_t>(config.experts()), 0};
    const uint64_t word = RoundWord{1, 1}.encode();
    if (nodes == 2) {
      const size_t slots = layout.section_offset(0, Section::kDispatchSlots);
      std::memcpy(world.world().arena(0) + slots + RowShape::ids_offset(), ids, sizeof ids);
      std::memcpy(world.world().arena(0) + layout.arrival(0, Operation::kDispatch, 1), &word, sizeof word);
    } else {
      const size_t staged = layout.outgoing(0, Operation::kDispatch);
      std::memcpy(world.world().arena(1) + staged + RowShape::ids_offset(), ids, sizeof ids);
      std::memset(world.world().arena(1) + layout.row_list(0, 0, 0), 0, sizeof(uint32_t));
      std::memcpy(world.world().arena(0) + layout.dispatch_flag(0, layout.block(0, 0, 1)), &word,
                  sizeof word);
    }
    world.rank(0).dispatch_recv(0);
    world.rank(0).sync();
    EXPECT_EQ(world.rank(0).error().fault, Fault::kRowExpert) << nodes << " nodes";
    EXPECT_EQ(world.rank(0).error().rank, nodes - 1);
    EXPECT_EQ(world.rank(0).error().detail, ids[0]);
  }
}

TEST(Faults, AnAnswerThatLiesOutsideTheResultsIsRefused) {
  const WorldConfig config = small_config(1, 2);
  CudaWorld world(config, impatient());
  const Layout& layout = config.layout;
  const auto round = Planner(config).plan();
  for (const uint32_t rank : {0u, 1u}) world.rank(rank).dispatch_send(0, round[rank]);
  for (const uint32_t rank : {0u, 1u}) world.rank(rank).dispatch_recv(0);
  world.rank(0).combine_send(0);
  for (const uint32_t rank : {0u, 1u}) world.rank(rank).sync();
  uint64_t sent = 0;
  std::memcpy(&sent, world.world().arena(1) + layout.dispatch_flag(0, layout.block(1, 0, 0)), sizeof sent);
  const uint32_t rows = RoundWord::decode(sent).rows;
  const uint64_t answer[2] = {sent, config.world() * layout.max_tokens - rows + 1};
  std::memcpy(world.world().arena(0) + layout.result_flag(0, layout.block(0, 0, 1)), answer, sizeof answer);
  world.rank(0).combine_recv(0);
  world.rank(0).sync();
  EXPECT_EQ(world.rank(0).error().fault, Fault::kRowCount);
  EXPECT_EQ(world.rank(0).error().rank, 1u);
}

// Rows may be overwritten when the network has read them, and no sooner: the last write counts as well. Here
// one is made to look unfinished.
TEST(Faults, ARoundEndsAfterItsLastWrite) {
  for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
    const bool dispatch = operation == Operation::kDispatch;
    const WorldConfig config = small_config(2, 1);
    CudaWorld world(config, impatient());
    const auto round = Planner(config).plan();
    const auto run = [&](Half half) {
      for (const uint32_t rank : {0u, 1u}) world.rank(rank).queue(half, 0, round[rank]);
      for (const uint32_t rank : {0u, 1u}) world.rank(rank).sync();
    };
    run(Half::kDispatchSend);
    run(Half::kDispatchRecv);
    const auto writes_so_far = [&] {
      world.world().proxy(0)->drain(kPatience);  // what has arrived need not be counted yet
      return world.world().proxy(0)->counters().writes;
    };
    const uint64_t dispatched = writes_so_far();
    if (!dispatch) {
      run(Half::kCombineSend);
      run(Half::kCombineRecv);
    }
    const uint64_t writes = writes_so_far() - (dispatch ? 0 : dispatched);
    std::byte* word = world.world().arena(0) + config.layout.completion(0, operation);
    const std::atomic_ref done(*reinterpret_cast<uint64_t*>(word));
    const Patience patience;
    while (done.load(std::memory_order_acquire) != writes) {
      patience.check();
      std::this_thread::yield();
    }
    done.store(writes - 1, std::memory_order_release);
    run(dispatch ? Half::kCombineSend : Half::kDispatchSend);
    run(dispatch ? Half::kCombineRecv : Half::kDispatchRecv);
    EXPECT_EQ(world.rank(0).error(), (DeviceError{.fault = Fault::kTimeout,
                                                  .half = dispatch ? Half::kCombineRecv : Half::kDispatchRecv,
                                                  .channel = 0,
                                                  .rank = 0,
                                                  .round = dispatch ? 1u : 2u,
                                                  .detail = 0}));
  }
}

}  // namespace
}  // namespace efa_ep
