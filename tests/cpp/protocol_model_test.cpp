// The protocol's central theorem, model-checked: rounds clock themselves, and every signal is needed or
// explained. docs/protocol_model.md says what is modelled and why the searches prove it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "../model/device_order.h"
#include "../model/protocol_net.h"
#include "../model/search.h"
#include "../model/steps.h"

namespace efa_ep::model {
namespace {

constexpr uint64_t kSeed = 20240611;

std::mt19937_64 seeded_random() {
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  return std::mt19937_64(kSeed);
}

struct Shape {
  uint32_t nodes;
  uint32_t ranks_per_node;
  Topology topology() const { return {nodes * ranks_per_node, ranks_per_node}; }
  std::string name() const { return std::to_string(nodes) + "x" + std::to_string(ranks_per_node); }
};

const std::vector<Shape> kShapes = {{1, 1}, {2, 1}, {3, 1}, {4, 1}, {1, 2}, {1, 3}, {1, 4},
                                    {2, 2}, {2, 3}, {3, 2}, {2, 4}, {4, 2}, {4, 4}};

/// Runs a search, prints a row of the table, and returns the result.
template <class SearchCall>
SearchResult timed(const std::string& shape, std::string_view method, const SearchCall& search) {
  const auto start = std::chrono::steady_clock::now();
  const SearchResult result = search();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%-18s %-20s %10llu states %11llu transitions %7.2f s%s\n", shape.c_str(), method.data(),
              static_cast<unsigned long long>(result.states),
              static_cast<unsigned long long>(result.transitions), seconds.count(),
              result.complete ? "" : "  (stopped at the limit)");
  return result;
}

std::string readable(const ProtocolNet& net, const Violation& violation) {
  std::string text;
  for (const Firing& firing : violation.trace) {
    text += "  round " + std::to_string(firing.round) + ": " + net.describe(firing.step) + "\n";
  }
  return text + "  => " + violation.what + "\n";
}

void expect_holds(const ProtocolNet& net, const SearchResult& result) {
  if (result.violation) {
    ADD_FAILURE() << readable(net, *result.violation);
  }
  EXPECT_FALSE(result.runaway) << "a rank can get arbitrarily far ahead";
}

// ---- the intact protocol

TEST(ProtocolModel, HoldsInEveryInterleavingOfSmallShapes) {
  for (const Shape& shape : {Shape{1, 1}, {2, 1}, {1, 2}, {1, 3}, {1, 4}}) {
    const ProtocolNet net({.topology = shape.topology()});
    const SearchResult result = timed(shape.name(), "every interleaving", [&] { return search_all(net); });
    expect_holds(net, result);
    EXPECT_TRUE(result.complete);
  }
}

TEST(ProtocolModel, HoldsInTheFirstStatesAndRandomRunsOfLargerShapes) {
  constexpr uint64_t kStates = 300'000;
  constexpr uint32_t kRuns = 300;
  constexpr uint32_t kRounds = 20;
  auto random = seeded_random();
  for (const Shape& shape : {Shape{3, 1}, {4, 1}, {2, 2}}) {
    const ProtocolNet net({.topology = shape.topology()});
    expect_holds(net, timed(shape.name(), "every interleaving",
                            [&] { return search_all(net, {.max_states = kStates}); }));
    for (uint32_t run = 0; run < kRuns; ++run) {
      const auto rule = random_run(net, kRounds, random);
      ASSERT_FALSE(rule) << shape.name() << ", seed " << kSeed << ", run " << run << ": " << *rule;
    }
  }
}

TEST(ProtocolModel, HoldsBufferByBufferForAllShapes) {
  for (const Shape& shape : kShapes) {
    const ProtocolNet net({.topology = shape.topology()});
    const SearchResult result = timed(shape.name(), "buffer by buffer", [&] { return search_buffers(net); });
    expect_holds(net, result);
    EXPECT_TRUE(result.complete);
  }
}

TEST(ProtocolModel, HoldsForSixtyFourRanksOnEightNodes) {
  const ProtocolNet net({.topology = {64, 8}});
  expect_holds(net, timed("8x8", "buffers of one rank", [&] { return search_buffers(net, true, 0); }));
}

// Channels drift apart without limit, so these searches end after a few rounds. That is no restriction:
// nothing of one channel touches anything of the other, so each behaves as if it were alone.
TEST(ProtocolModel, HoldsForTwoChannels) {
  for (const Shape& shape : {Shape{2, 1}, {1, 2}, {2, 2}}) {
    const ProtocolNet net({.topology = shape.topology(), .channels = 2});
    const auto channel = [&](uint32_t step) { return net.steps()[step].label.channel; };
    for (uint32_t step = 0; step < net.steps().size(); ++step) {
      for (const auto& wait : net.steps()[step].waits) EXPECT_EQ(channel(wait.step), channel(step));
    }
    for (const auto& buffer : net.buffers()) {
      for (const auto& reader : buffer.readers) EXPECT_EQ(channel(reader.step), channel(buffer.writer));
    }
    expect_holds(net, timed(shape.name() + " two channels", "buffer by buffer",
                            [&] { return search_buffers(net, false); }));
  }
  const ProtocolNet net({.topology = {2, 2}, .channels = 2});
  expect_holds(net, timed("1x2 two channels", "every interleaving",
                          [&] { return search_all(net, {.unbounded = false}); }));
}

// ---- without one of its signals

enum class Verdict { kAbsent, kRedundant, kBroken };

struct Expectation {
  Signal signal;
  // By kind of shape: one rank, several nodes of one rank, one node of several ranks, several nodes of
  // several.
  Verdict one, nodes, node, both;
};

Verdict expected(const Expectation& row, const Shape& shape) {
  if (shape.nodes == 1) return shape.ranks_per_node == 1 ? row.one : row.node;
  return shape.ranks_per_node == 1 ? row.nodes : row.both;
}

constexpr Verdict kAbsent = Verdict::kAbsent;
constexpr Verdict kRedundant = Verdict::kRedundant;
constexpr Verdict kBroken = Verdict::kBroken;
constexpr Expectation kExpectations[] = {
    {Signal::kDispatchArrival, kAbsent, kBroken, kAbsent, kBroken},
    {Signal::kForwardedFlag, kAbsent, kAbsent, kAbsent, kBroken},
    {Signal::kLocalFlag, kAbsent, kAbsent, kBroken, kRedundant},
    {Signal::kRemoteResultFlag, kAbsent, kAbsent, kAbsent, kBroken},
    {Signal::kOwnNodeResultFlag, kAbsent, kAbsent, kBroken, kBroken},
    {Signal::kCombineArrival, kAbsent, kBroken, kAbsent, kBroken},
    {Signal::kDispatchCompletion, kAbsent, kBroken, kAbsent, kBroken},
    {Signal::kCombineCompletion, kAbsent, kBroken, kAbsent, kBroken},
    {Signal::kRoundEnd, kRedundant, kBroken, kBroken, kBroken},
};

SearchResult without(const Shape& shape, Signal signal, bool staging_until_completion = true) {
  return search_buffers(ProtocolNet({.topology = shape.topology(),
                                     .removed = signal,
                                     .staging_until_completion = staging_until_completion}));
}

TEST(ProtocolModel, BreaksWithoutASignalExactlyAsExpected) {
  for (const Expectation& row : kExpectations) {
    bool shown = false;
    for (const Shape& shape : kShapes) {
      const std::string name =
          std::string(kSignalNames[static_cast<uint32_t>(row.signal)]) + ", " + shape.name();
      const ProtocolNet net({.topology = shape.topology(), .removed = row.signal});
      Verdict verdict = Verdict::kAbsent;
      if (net.removed_waits() > 0) {
        const SearchResult result = search_buffers(net);
        verdict = result.violation ? Verdict::kBroken : Verdict::kRedundant;
        EXPECT_FALSE(verdict == kRedundant && result.runaway) << name;
        if (result.violation && !shown) {
          std::printf("without %s:\n%s", name.c_str(), readable(net, *result.violation).c_str());
          shown = true;
        }
      }
      EXPECT_EQ(verdict, expected(row, shape)) << name;
    }
  }
}

// The waits for completions keep the fabric's contract; the data are safe without them.
TEST(ProtocolModel, NeedsNoCompletionIfLandedBytesWereEnoughToReuseStaging) {
  for (const Shape& shape : kShapes) {
    for (const Signal signal : {Signal::kNone, Signal::kDispatchCompletion, Signal::kCombineCompletion}) {
      const SearchResult result = without(shape, signal, false);
      EXPECT_FALSE(result.violation || result.runaway) << shape.name();
    }
  }
}

// The reduction must not hide anything: on shapes where both searches finish they agree, down to the length
// of the shortest counterexample.
TEST(ProtocolModel, FindsTheSameBufferByBufferAsInEveryInterleaving) {
  for (const Shape& shape : {Shape{1, 1}, {2, 1}, {1, 2}, {1, 3}}) {
    for (const Expectation& row : kExpectations) {
      for (const bool staging_until_completion : {true, false}) {
        const ProtocolNet net({.topology = shape.topology(),
                               .removed = row.signal,
                               .staging_until_completion = staging_until_completion});
        const SearchResult all = search_all(net);
        const SearchResult reduced = search_buffers(net);
        ASSERT_EQ(all.violation.has_value(), reduced.violation.has_value()) << shape.name();
        if (all.violation) {
          EXPECT_EQ(all.violation->trace.size(), reduced.violation->trace.size()) << shape.name();
        }
      }
    }
  }
}

TEST(ProtocolModel, FindsMissingSignalsInRandomRunsToo) {
  auto random = seeded_random();
  for (const Expectation& row : kExpectations) {
    if (row.both != kBroken) continue;
    const ProtocolNet net({.topology = {4, 2}, .removed = row.signal});
    uint32_t broken = 0;
    for (uint32_t run = 0; run < 300; ++run) broken += random_run(net, 5, random) ? 1 : 0;
    EXPECT_GT(broken, 0u) << kSignalNames[static_cast<uint32_t>(row.signal)];
    std::printf("%-34s found in %3u of 300 random runs of 2x2\n",
                kSignalNames[static_cast<uint32_t>(row.signal)].data(), broken);
  }
}

// ---- silence of pairs without rows

/// Every choice of (pair of different ranks, round) for two ranks, or random ones.
std::vector<std::vector<RoundSet>> emptiness(uint32_t world, std::mt19937_64& random) {
  std::vector<std::vector<RoundSet>> choices;
  const auto add = [&](uint64_t bits) {
    std::vector<RoundSet> empty(world * world, 0);
    for (uint32_t source = 0; source < world; ++source) {
      for (uint32_t owner = 0; owner < world; ++owner) {
        if (source == owner) continue;
        empty[source * world + owner] = static_cast<RoundSet>((bits & 7) << 1);
        bits >>= 3;
      }
    }
    choices.push_back(empty);
  };
  if (world == 2) {
    for (uint64_t bits = 0; bits < 64; ++bits) add(bits);
  } else {
    for (int i = 0; i < 100; ++i) add(random());
  }
  return choices;
}

TEST(ProtocolModel, BreaksIfPairsWithoutRowsAreSilentInCombine) {
  auto random = seeded_random();
  for (const Shape& shape : {Shape{2, 1}, {1, 2}, {2, 2}}) {
    uint32_t broken = 0;
    uint32_t tried = 0;
    for (const auto& empty : emptiness(shape.topology().world, random)) {
      const ProtocolNet net({.topology = shape.topology(), .silence = Silence::kCombine, .empty = empty});
      const SearchResult result = search_buffers(net, false);
      if (result.violation && broken == 0) {
        std::printf("silent in combine, %s:\n%s", shape.name().c_str(),
                    readable(net, *result.violation).c_str());
      }
      broken += result.violation ? 1 : 0;
      ++tried;
    }
    EXPECT_GT(broken, 0u) << shape.name();
    std::printf("%s: broken for %u of %u choices of empty pairs\n", shape.name().c_str(), broken, tried);
  }
}

// Silence in both operations would keep the buffers intact, could a receiver know who is silent; but then
// nothing bounds how far ranks drift apart.
TEST(ProtocolModel, LosesItsClockIfPairsWithoutRowsAreSilentThroughout) {
  auto random = seeded_random();
  for (const Shape& shape : {Shape{2, 1}, {1, 2}, {2, 2}}) {
    const uint32_t world = shape.topology().world;
    for (const auto& empty : emptiness(world, random)) {
      const ProtocolNet net({.topology = shape.topology(), .silence = Silence::kBoth, .empty = empty});
      const SearchResult result = search_buffers(net, false);
      ASSERT_FALSE(result.violation) << shape.name() << "\n" << readable(net, *result.violation);
    }
    const ProtocolNet net({.topology = shape.topology(),
                           .silence = Silence::kBoth,
                           .empty = std::vector<RoundSet>(world * world, kAllRounds)});
    EXPECT_TRUE(search_buffers(net).runaway) << shape.name();
  }
}

// ---- devices that run one half at a time for two channels

using Calls = std::vector<HalfCall>;

Calls merge(const std::vector<bool>& second_channel) {
  Calls calls;
  std::array<uint32_t, 2> next{};
  for (const bool second : second_channel) {
    const uint32_t channel = second ? 1 : 0;
    calls.push_back({channel, static_cast<Half>(next[channel]++ % 4)});
  }
  return calls;
}

/// The 70 orders of two channels' halves in a round, each repeated for the rounds that Progress can hold.
std::vector<Calls> repeated_orders() {
  std::vector<Calls> orders;
  std::vector<bool> choice = {false, false, false, false, true, true, true, true};
  do {
    std::vector<bool> rounds;
    for (int round = 0; round < Progress::kMost; ++round)
      rounds.insert(rounds.end(), choice.begin(), choice.end());
    orders.push_back(merge(rounds));
  } while (std::next_permutation(choice.begin(), choice.end()));
  return orders;
}

TEST(TwoChannels, AlwaysReturnIfAllRanksOrderTheirHalvesAlike) {
  auto random = seeded_random();
  for (const Shape& shape : {Shape{2, 1}, {1, 2}, {2, 2}, {3, 2}}) {
    const ProtocolNet net({.topology = shape.topology(), .channels = 2});
    std::vector<Calls> orders = repeated_orders();
    std::vector<bool> choice(8 * Progress::kMost, false);
    std::fill(choice.begin() + 4 * Progress::kMost, choice.end(), true);
    for (int i = 0; i < 200; ++i) {
      std::shuffle(choice.begin(), choice.end(), random);
      orders.push_back(merge(choice));
    }
    for (const Calls& calls : orders) {
      ASSERT_TRUE(all_calls_return(net, std::vector<Calls>(shape.topology().world, calls))) << shape.name();
    }
  }
}

TEST(TwoChannels, CanDeadlockIfRanksOrderTheirHalvesDifferently) {
  const std::vector<Calls> orders = repeated_orders();
  for (const Shape& shape : {Shape{2, 1}, {1, 2}}) {
    const ProtocolNet net({.topology = shape.topology(), .channels = 2});
    uint32_t stuck = 0;
    for (const Calls& first : orders) {
      for (const Calls& second : orders) stuck += all_calls_return(net, {first, second}) ? 0 : 1;
    }
    EXPECT_GT(stuck, 0u);
    std::printf("%s: %u of %zu pairs of orders deadlock\n", shape.name().c_str(), stuck,
                orders.size() * orders.size());
  }
}

// Sending on both channels before receiving on either is enough only where no rank forwards for another.
TEST(TwoChannels, CanDeadlockEvenIfAllRanksSendFirst) {
  const auto sends_first = [](uint32_t a) {
    const uint32_t b = 1 - a;
    return Calls{{a, Half::kDispatchSend}, {b, Half::kDispatchSend}, {a, Half::kDispatchRecv},
                 {b, Half::kDispatchRecv}, {a, Half::kCombineSend},  {b, Half::kCombineSend},
                 {a, Half::kCombineRecv},  {b, Half::kCombineRecv}};
  };
  const ProtocolNet flat({.topology = {2, 1}, .channels = 2});
  EXPECT_TRUE(all_calls_return(flat, {sends_first(0), sends_first(1)}));
  const ProtocolNet forwarding({.topology = {4, 2}, .channels = 2});
  EXPECT_FALSE(
      all_calls_return(forwarding, {sends_first(0), sends_first(1), sends_first(0), sends_first(1)}));
}

}  // namespace
}  // namespace efa_ep::model
