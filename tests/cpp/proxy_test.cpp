// The proxy as sender, its errors and its threads.
#include <algorithm>
#include <array>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "errors.h"
#include "proxy_fixture.h"

namespace efa_ep {
namespace {

constexpr auto kDispatch = Operation::kDispatch;
constexpr auto kCombine = Operation::kCombine;
constexpr std::array<Operation, 2> kBoth = {kDispatch, kCombine};

TEST_F(ProxyTest, SendsEveryChunkOnceToItsPlaceOverItsRail) {
  network_options_.rails = 3;
  start(4);
  std::vector<uint64_t> chunks(4, 0);
  network_->set_rule([&](uint32_t, const WriteRequest& request) {
    const Immediate immediate = Immediate::decode(request.immediate);
    EXPECT_EQ(request.rail, (request.peer - 1 + immediate.chunk()) % 3);
    ++chunks[request.peer];
    return LoopbackNetwork::Fault::kNone;
  });
  uint64_t writes = 0;
  uint64_t bytes = 0;
  for (uint32_t round = 1; round <= 10; ++round) {
    for (uint32_t target = 1; target < 4; ++target) {
      for (const Operation operation : kBoth) {
        const Shipment shipment{round % 2, operation, round,
                                static_cast<uint32_t>(random_() % (kMaxTokens + 1))};
        submit(target, shipment);
        proxy_->drain(kForever);
        std::vector<uint32_t> arrived;
        help_until([&] {
          for (const uint32_t bits : poll(target)) arrived.push_back(bits);
          return arrived.size() == chunking(shipment).chunks;
        });
        std::vector<uint32_t> expected;
        for (uint32_t chunk = 0; chunk < chunking(shipment).chunks; ++chunk) {
          expected.push_back(immediate(0, shipment, chunk).encode());
        }
        std::sort(arrived.begin(), arrived.end());
        std::sort(expected.begin(), expected.end());
        EXPECT_EQ(arrived, expected);
        EXPECT_TRUE(has_arrived(0, target, shipment));
        writes += expected.size();
        bytes += shipment.rows * layout_.row_bytes(operation);
      }
    }
  }
  const ProxyCounters counters = proxy_->counters();
  EXPECT_EQ(counters.writes, writes);
  EXPECT_EQ(counters.bytes, bytes);
  EXPECT_EQ(counters.completions, writes);
  EXPECT_EQ(counters.immediates, 0u);
  EXPECT_EQ(chunks[1] + chunks[2] + chunks[3], writes + counters.retries);
}

// The completion word allows the device to overwrite its staging.
TEST_F(ProxyTest, TheCompletionWordCountsPerChannelAndOperation) {
  start(2, true);
  std::array<uint64_t, 4> submitted{};
  for (uint32_t round = 1; round <= 60; ++round) {
    const uint32_t pair = random_() % 4;
    const Shipment shipment{pair % 2, kBoth[pair / 2], round,
                            1 + static_cast<uint32_t>(random_() % kMaxTokens)};
    submit(1, shipment);
    submitted[pair] += chunking(shipment).chunks;
    wait_until(
        [&] { return word(layout_.completion(shipment.channel, shipment.operation)) == submitted[pair]; });
    std::fill_n(arenas_[0].data() + staging(0, 1, shipment),
                shipment.rows * layout_.row_bytes(shipment.operation), std::byte{0xEE});
    EXPECT_TRUE(has_arrived(0, 1, shipment));
  }
  for (uint32_t pair = 0; pair < 4; ++pair) {
    EXPECT_EQ(word(layout_.completion(pair % 2, kBoth[pair / 2])), submitted[pair]);
  }
}

TEST_F(ProxyTest, TriesAgainWhenTheQueueIsFull) {
  network_options_ = {.rails = 2, .send_queue_depth = 1};
  start(3);
  const Shipment shipment{1, kCombine, 1, kMaxTokens};
  for (const uint32_t target : {1u, 2u}) submit(target, shipment);
  proxy_->drain(kForever);
  for (const uint32_t target : {1u, 2u}) EXPECT_TRUE(has_arrived(0, target, shipment));
  const ProxyCounters counters = proxy_->counters();
  EXPECT_GT(counters.retries, 0u);
  EXPECT_EQ(counters.retries, network_->traffic(0).refusals);
  EXPECT_EQ(counters.writes, 2u * chunking(shipment).chunks);
}

TEST_F(ProxyTest, ChunksOfOneDestinationAreSentInTheirOrder) {
  network_options_ = {.rails = 2, .send_queue_depth = 2};
  start(3);
  std::vector<std::vector<uint32_t>> posted(3);
  network_->set_rule([&](uint32_t, const WriteRequest& request) {
    posted[request.peer].push_back(Immediate::decode(request.immediate).chunk());
    return LoopbackNetwork::Fault::kNone;
  });
  for (const uint32_t target : {1u, 2u}) submit(target, {0, kDispatch, 1, kMaxTokens});
  proxy_->drain(kForever);
  for (const uint32_t target : {1u, 2u})
    EXPECT_TRUE(std::is_sorted(posted[target].begin(), posted[target].end()));
}

TEST_F(ProxyTest, ARefusingDestinationHoldsUpOnlyItself) {
  network_options_.send_queue_depth = 2;  // the others have to queue, too
  start(4);
  network_->set_rule([](uint32_t, const WriteRequest& request) {
    return request.peer == 1 ? LoopbackNetwork::Fault::kRefuse : LoopbackNetwork::Fault::kNone;
  });
  const Shipment shipment{0, kDispatch, 1, kMaxTokens};
  for (uint32_t target = 1; target < 4; ++target) submit(target, shipment);
  help_until([&] { return proxy_->unfinished_destinations() == std::vector<uint32_t>{1}; });
  for (const uint32_t target : {2u, 3u}) EXPECT_TRUE(has_arrived(0, target, shipment));
  network_->set_rule(nullptr);
  proxy_->drain(kForever);
  EXPECT_TRUE(has_arrived(0, 1, shipment));
}

TEST_F(ProxyTest, ADestinationThatRefusesTooLongIsATransportError) {
  proxy_options_.timeout = std::chrono::milliseconds(1);
  start(3);
  network_->set_rule([](uint32_t, const WriteRequest& request) {
    return request.peer == 2 ? LoopbackNetwork::Fault::kRefuse : LoopbackNetwork::Fault::kNone;
  });
  submit(2, {0, kDispatch, 1, 1});
  try {
    help_until([] { return false; });
  } catch (const TransportError& error) {
    EXPECT_EQ(error.peer, 2);
    EXPECT_NE(std::string(error.what()).find("rank 2"), std::string::npos) << error.what();
  }
}

// Rank 1 never completes the one write that the queue has room for.
TEST_F(ProxyTest, ADestinationThatOthersCrowdOutIsNotBlamed) {
  proxy_options_.timeout = std::chrono::milliseconds(1);
  network_options_.rails = 1;
  network_options_.send_queue_depth = 1;
  start(3);
  network_->set_rule([](uint32_t, const WriteRequest& request) {
    return request.peer == 1 ? LoopbackNetwork::Fault::kNeverComplete : LoopbackNetwork::Fault::kNone;
  });
  submit(1, {0, kDispatch, 1, 1});
  submit(2, {0, kDispatch, 1, 1});
  proxy_->help();
  const auto refused_at = std::chrono::steady_clock::now();
  help_until([&] { return std::chrono::steady_clock::now() > refused_at + 2 * proxy_options_.timeout; });
  proxy_->help();
  EXPECT_NO_THROW(proxy_->throw_if_failed());
  EXPECT_GT(proxy_->counters().retries, 1u);
  EXPECT_EQ(proxy_->unfinished_destinations(), (std::vector<uint32_t>{1, 2}));
}

TEST_F(ProxyTest, TheDeadlineCountsFromTheLastAcceptedWrite) {
  proxy_options_.timeout = std::chrono::milliseconds(1);
  start(2);
  bool refuse = true;
  network_->set_rule([&](uint32_t, const WriteRequest&) {
    return refuse ? LoopbackNetwork::Fault::kRefuse : LoopbackNetwork::Fault::kNone;
  });
  submit(1, {0, kDispatch, 1, 1});
  const auto refused_at = std::chrono::steady_clock::now();
  proxy_->help();
  refuse = false;
  proxy_->drain(kForever);
  wait_until([&] { return std::chrono::steady_clock::now() > refused_at + 2 * proxy_options_.timeout; });
  refuse = true;
  submit(1, {0, kCombine, 1, 1});
  proxy_->help();
  EXPECT_NO_THROW(proxy_->throw_if_failed());
}

TEST_F(ProxyTest, AFailedWriteIsATransportErrorInEveryThread) {
  start(3);
  network_->set_rule([](uint32_t, const WriteRequest& request) {
    return request.peer == 2 ? LoopbackNetwork::Fault::kFail : LoopbackNetwork::Fault::kNone;
  });
  submit(1, {0, kDispatch, 1, 1});
  submit(2, {0, kDispatch, 1, 1});
  EXPECT_THROW(help_until([] { return false; }), TransportError);
  const auto expect_error = [&] {
    try {
      proxy_->throw_if_failed();
      ADD_FAILURE();
    } catch (const TransportError& error) {
      EXPECT_EQ(error.peer, 2);
      EXPECT_NE(std::string(error.what()).find("the loopback network failed"), std::string::npos);
    }
  };
  std::thread(expect_error).join();
  expect_error();
  EXPECT_FALSE(proxy_->help());
  EXPECT_THROW(proxy_->drain(kForever), TransportError);
}

TEST_F(ProxyTest, TheProxysOwnThreadReportsErrorsToo) {
  start(2, true);
  network_->set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
  submit(1, {0, kDispatch, 1, 1});
  EXPECT_THROW(wait_until([] { return false; }), TransportError);
}

TEST_F(ProxyTest, TheRingRefusesWhatItCannotHold) {
  proxy_options_.ring_commands = 4;
  start(2);
  const Command command{.immediate = immediate(0, {}, 0).encode(), .destination_node = 1};
  for (uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(proxy_->try_submit(command));
  EXPECT_FALSE(proxy_->try_submit(command));
  EXPECT_TRUE(proxy_->help());
  EXPECT_TRUE(proxy_->try_submit(command));
  proxy_->drain(kForever);
  EXPECT_EQ(proxy_->counters().writes, 5u);
}

// Without a core for the proxy's thread, who submits does the work, and wakes nobody.
TEST_F(ProxyTest, PostsInTheSubmittingThreadIfItHasNoCoreOfItsOwn) {
  proxy_options_.own_core = false;
  start(2);
  submit(1, {0, kDispatch, 1, kMaxTokens});
  EXPECT_EQ(proxy_->counters().writes, chunking({0, kDispatch, 1, kMaxTokens}).chunks);
}

TEST_F(ProxyTest, NeedsNoHelp) {
  start(2, true);
  for (uint32_t value = 1; value <= 200; ++value) {
    Immediate bits = immediate(0, {}, 0);
    bits.value = value;
    ASSERT_TRUE(proxy_->try_submit({bits.encode(), 1, 0, 0}));
    std::vector<uint32_t> arrived;
    wait_until([&] {
      arrived = poll(1);
      return !arrived.empty();
    });
    EXPECT_EQ(arrived, std::vector<uint32_t>{bits.encode()});
  }
}

// Everybody submits, everybody helps: nothing is lost, nothing is sent twice, whatever the proxy's thread
// does.
TEST_F(ProxyTest, ManyThreadsSubmitAndHelp) {
  for (const bool with_thread : {false, true}) {
    start(3, with_thread);
    constexpr uint32_t kThreads = 3;
    constexpr uint32_t kCommands = 1500;
    std::atomic<uint32_t> running{kThreads};
    std::vector<std::thread> threads;
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        for (uint32_t i = 0; i < kCommands; ++i) {
          const Immediate bits{.channel = thread % 2, .value = thread * kCommands + i};
          const Command command{.immediate = bits.encode(),
                                .destination_node = static_cast<uint16_t>(1 + i % 2)};
          while (!proxy_->try_submit(command)) proxy_->help();
          if (i % 7 == 0) proxy_->help();
        }
        proxy_->drain(kForever);
        --running;
      });
    }
    std::vector<uint32_t> seen(kThreads * kCommands, 0);
    uint32_t arrived = 0;
    wait_until([&] {
      for (const uint32_t target : {1u, 2u}) {
        for (const uint32_t bits : poll(target)) {
          ++seen.at(Immediate::decode(bits).value);
          ++arrived;
        }
      }
      return arrived >= seen.size() && running == 0;
    });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1u), static_cast<ptrdiff_t>(seen.size()));
    proxy_->drain(kForever);
    EXPECT_EQ(proxy_->counters().writes, seen.size());
    EXPECT_EQ(proxy_->counters().completions, seen.size());
  }
}

// Also when another thread takes the command from the ring meanwhile. A drain that looks at the destinations
// before the ring returns too early about once in 150,000 times.
TEST_F(ProxyTest, DrainWaitsForAllThatWasSubmitted) {
  const uint32_t commands = amount(50'000, 1'000'000);
  start(2);
  std::atomic<bool> stop{false};
  std::thread helper([&] {
    while (!stop) proxy_->help();
  });
  for (uint32_t submitted = 1; submitted <= commands && !HasFailure(); ++submitted) {
    while (!proxy_->try_submit({immediate(0, {}, 0).encode(), 1, 0, 0})) proxy_->help();
    proxy_->drain(kForever);
    EXPECT_EQ(proxy_->counters().completions, submitted);
  }
  stop = true;
  helper.join();
}

TEST_F(ProxyTest, DrainNamesTheRanksThatKeepItWaiting) {
  start(4);
  network_->set_rule([](uint32_t, const WriteRequest& request) {
    return request.peer == 2 ? LoopbackNetwork::Fault::kNeverComplete : LoopbackNetwork::Fault::kNone;
  });
  for (uint32_t target = 1; target < 4; ++target) submit(target, {0, kDispatch, 1, kMaxTokens});
  help_until([&] { return proxy_->unfinished_destinations() == std::vector<uint32_t>{2}; });
  try {
    proxy_->drain(std::chrono::milliseconds(1));
    FAIL();
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.missing, std::vector<uint32_t>{2});
    EXPECT_EQ(error.half, "drain");
  }
}

TEST_F(ProxyTest, DrainEndsWithTheCallersOwnError) {
  struct Interrupted {
    std::string wait;
  };
  start(2);
  network_->hold_completions(true);
  submit(1, {0, kDispatch, 1, 1});
  try {
    proxy_->drain(kForever, [](const Wait& wait) { throw Interrupted{wait.describe()}; });
    FAIL();
  } catch (const Interrupted& interrupted) {
    EXPECT_NE(interrupted.wait.find("writes to rank 1"), std::string::npos) << interrupted.wait;
  }
}

TEST_F(ProxyTest, StopsWithWorkInFlight) {
  for (uint32_t i = 0; i < 50; ++i) {
    start(2, i % 2 == 0);
    if (i % 3 != 0) submit(1, {0, kDispatch, 1, i % (kMaxTokens + 1)});
    if (i % 5 == 0) proxy_->help();
  }
}

}  // namespace
}  // namespace efa_ep
