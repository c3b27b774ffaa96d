#include "proxy/command_ring.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "test_environment.h"

namespace efa_ep {
namespace {

bool operator==(const Command& a, const Command& b) {
  return a.immediate == b.immediate && a.destination_node == b.destination_node &&
         a.local_row == b.local_row && a.first_row == b.first_row && a.rows == b.rows;
}

TEST(CommandRing, CarriesEveryBitOfACommand) {
  CommandRing ring(2);
  const std::vector<Command> commands = {
      {0, 0, 0, 0, 0},          {0xFFFFFFFF, 127, 0xFFFFFFFF, 0xFFFF, 0xFFFF},
      {0xFFFFFFFF, 0, 0, 0, 0}, {0, 127, 0, 0, 0},
      {0, 0, 0xFFFFFFFF, 0, 0}, {0, 0, 0, 0xFFFF, 0},
      {0, 0, 0, 0, 0xFFFF},     {0x80000001, 64, 0x80000001, 0x8001, 0x4002}};
  for (const Command& command : commands) {
    ASSERT_TRUE(ring.try_push(command));
    Command popped;
    ASSERT_TRUE(ring.try_pop(popped));
    EXPECT_TRUE(popped == command);
  }
}

TEST(CommandRing, RoundsTheCapacityUpToAPowerOfTwo) {
  EXPECT_EQ(CommandRing(1).capacity(), 1u);
  EXPECT_EQ(CommandRing(5).capacity(), 8u);
  EXPECT_EQ(CommandRing(4096).capacity(), 4096u);
}

// A command in which every bit of every field matters.
Command command_of(uint32_t immediate, uint32_t node, uint32_t value) {
  return {.immediate = immediate,
          .destination_node = static_cast<uint16_t>(node),
          .local_row = ~value,
          .first_row = static_cast<uint16_t>(value * 7),
          .rows = static_cast<uint16_t>(~value * 5)};
}

// Against a queue, over many laps: full exactly at its capacity, empty exactly at zero.
TEST(CommandRing, IsAQueueOverManyLaps) {
  const uint64_t seed = test_seed(11);
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  for (const uint32_t capacity : {1u, 2u, 8u, 64u}) {
    std::mt19937_64 random(seed);
    CommandRing ring(capacity);
    std::deque<Command> queue;
    for (uint32_t i = 0; i < 50'000; ++i) {
      const auto bits = static_cast<uint32_t>(random());
      if (bits % 2 == 0) {
        const Command command = command_of(bits, bits % 128, i);
        ASSERT_EQ(ring.try_push(command), queue.size() < capacity);
        if (queue.size() < capacity) queue.push_back(command);
      } else {
        Command command;
        ASSERT_EQ(ring.try_pop(command), !queue.empty());
        if (queue.empty()) continue;
        ASSERT_TRUE(command == queue.front());
        queue.pop_front();
      }
      ASSERT_EQ(ring.empty(), queue.empty());
    }
  }
}

// Every producer's commands come out once and in its order, and with them what it wrote before it pushed.
void run_producers(uint32_t capacity, uint32_t producers, uint32_t commands) {
  CommandRing ring(capacity);
  std::vector<std::vector<uint32_t>> staging(producers, std::vector<uint32_t>(commands));
  std::vector<std::thread> threads;
  for (uint32_t producer = 0; producer < producers; ++producer) {
    threads.emplace_back([&, producer] {
      for (uint32_t i = 0; i < commands; ++i) {
        staging[producer][i] = ~i;
        while (!ring.try_push(command_of(i, producer, i * 3))) sched_yield();
      }
    });
  }
  std::vector<uint32_t> next(producers, 0);
  for (uint32_t received = 0; received < producers * commands;) {
    Command command;
    if (!ring.try_pop(command)) {
      sched_yield();
      continue;
    }
    ++received;
    const uint32_t producer = command.destination_node;
    const uint32_t i = next.at(producer)++;
    EXPECT_TRUE(command == command_of(i, producer, i * 3)) << "producer " << producer << ", " << i;
    EXPECT_EQ(staging[producer][i], ~i);
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(ring.empty());
}

TEST(CommandRing, OneProducerThroughTheSmallestRing) { run_producers(1, 1, 5'000); }
TEST(CommandRing, ManyProducersThroughASmallRing) { run_producers(4, 4, 5'000); }
TEST(CommandRing, ManyProducersThroughARingThatIsRarelyFull) { run_producers(1024, 4, 20'000); }

// Also when the consumer has overtaken the position that a producer has read. A push that takes a negative
// fill for a large one is refused in one of 20 such runs under ThreadSanitizer.
TEST(CommandRing, IsNotFullWhileItHasRoom) {
  constexpr uint32_t kProducers = 4;
  constexpr uint32_t kCommands = 16'384;
  for (uint32_t run = 0; run < amount(20, 400) && !testing::Test::HasFailure(); ++run) {
    CommandRing ring(kProducers * kCommands);
    std::atomic<uint32_t> refused{0};
    std::vector<std::thread> threads;
    for (uint32_t producer = 0; producer < kProducers; ++producer) {
      threads.emplace_back([&] {
        for (uint32_t i = 0; i < kCommands; ++i) refused += ring.try_push({}) ? 0 : 1;
      });
    }
    Command command;
    for (uint32_t received = 0; received + refused < kProducers * kCommands;) {
      received += ring.try_pop(command);
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(refused, 0u);
  }
}

// The consumer's role moves between threads, as it does between the proxy's thread and helping ones.
TEST(CommandRing, ConsumersTakeTurns) {
  constexpr uint32_t kCommands = 20'000;
  CommandRing ring(16);
  std::mutex role;
  uint32_t next = 0;
  const auto consume = [&] {
    while (true) {
      const std::unique_lock lock(role, std::try_to_lock);
      if (lock.owns_lock()) {
        if (next == kCommands) return;
        Command command;
        for (uint32_t i = 0; i < 5 && ring.try_pop(command); ++i) {
          EXPECT_EQ(command.immediate, next);
          ++next;
        }
      }
      sched_yield();
    }
  };
  std::thread first(consume);
  std::thread second(consume);
  for (uint32_t i = 0; i < kCommands; ++i) {
    while (!ring.try_push({.immediate = i})) sched_yield();
  }
  first.join();
  second.join();
  EXPECT_EQ(next, kCommands);
}

}  // namespace
}  // namespace efa_ep
