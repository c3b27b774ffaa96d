// The proxy as receiver: counting, publishing, refusing.
#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "proxy_fixture.h"

namespace efa_ep {
namespace {

constexpr auto kDispatch = Operation::kDispatch;
constexpr auto kCombine = Operation::kCombine;
constexpr std::array<Operation, 2> kBoth = {kDispatch, kCombine};

TEST_F(ProxyTest, PublishesAPairWhenItsLastChunkIsThere) {
  start(3);
  for (uint32_t round = 1; round <= 60; ++round) {
    const Shipment shipment{round % 2, kBoth[round / 2 % 2], (round + 3) / 4,
                            static_cast<uint32_t>(random_() % (kMaxTokens + 1))};
    const uint64_t before = proxy_->counters().immediates;
    const uint32_t chunks = chunking(shipment).chunks;
    write_all(2, shipment);
    help_until([&] {
      const bool all = proxy_->counters().immediates == before + chunks;
      EXPECT_EQ(arrival(shipment, 2).round, all ? shipment.round : shipment.round - 1);
      return all;
    });
    EXPECT_EQ(arrival(shipment, 2).rows, shipment.rows);
    EXPECT_TRUE(has_arrived(2, 0, shipment));
    EXPECT_EQ(arrival(shipment, 1).round, 0u) << "node 1 has sent nothing";
  }
}

// A device reads the word and then the rows, and holds no lock that the network holds.
TEST_F(ProxyTest, ThePublishedWordBringsTheRowsWithIt) {
  start(2, true);
  for (uint32_t round = 1; round <= 130; ++round) {  // the round tag wraps twice
    const Shipment shipment{0, kDispatch, round, round % (kMaxTokens + 1)};
    write_all(1, shipment);
    uint64_t last = 0;
    wait_until([&] {
      const uint64_t now = word(layout_.arrival(0, kDispatch, 1));
      EXPECT_GE(now, last);
      last = now;
      return RoundWord::decode(now).round == round;
    });
    EXPECT_TRUE(has_arrived(1, 0, shipment));
  }
}

TEST_F(ProxyTest, PairsAreIndependent) {
  start(4);
  std::vector<std::pair<uint32_t, Shipment>> shipments;
  for (uint32_t source = 1; source < 4; ++source) {
    for (const uint32_t channel : {0u, 1u}) {
      for (const Operation operation : kBoth) {
        shipments.push_back({source, {channel, operation, 1, static_cast<uint32_t>(random_() % kMaxTokens)}});
      }
    }
  }
  std::vector<std::pair<size_t, uint32_t>> writes;  // shipment, chunk
  for (size_t i = 0; i < shipments.size(); ++i) {
    stage(shipments[i].first, 0, shipments[i].second);
    for (uint32_t chunk = 0; chunk < chunking(shipments[i].second).chunks; ++chunk) {
      writes.emplace_back(i, chunk);
    }
  }
  std::shuffle(writes.begin(), writes.end(), random_);
  for (const auto& [i, chunk] : writes) write_chunk(shipments[i].first, shipments[i].second, chunk);
  help_until([&] { return proxy_->counters().immediates == writes.size(); });
  for (const auto& [source, shipment] : shipments) {
    EXPECT_EQ(arrival(shipment, source).round, 1u);
    EXPECT_EQ(arrival(shipment, source).rows, shipment.rows);
    EXPECT_TRUE(has_arrived(source, 0, shipment));
  }
}

struct Malformed {
  std::string name;
  std::vector<Immediate> immediates;  // all but the last are fine
  std::string explanation;
};

class MalformedImmediate : public ProxyTest, public testing::WithParamInterface<Malformed> {};

constexpr Immediate first(uint32_t rows) {
  return {.round_tag = 1, .source_node = 1, .first = true, .value = rows};
}
constexpr Immediate other(uint32_t chunk) { return {.round_tag = 1, .source_node = 1, .value = chunk}; }
constexpr Immediate with_tag(uint32_t tag) { return {.round_tag = tag, .source_node = 1, .first = true}; }

INSTANTIATE_TEST_SUITE_P(
    All, MalformedImmediate,
    testing::Values(
        Malformed{"Channel", {{.round_tag = 1, .channel = 1, .source_node = 1, .first = true}}, "channel 1"},
        Malformed{"SourceNode", {{.round_tag = 1, .source_node = 3, .first = true}}, "source node 3"},
        Malformed{"OwnNode", {{.round_tag = 1, .source_node = 0, .first = true}}, "source node 0"},
        Malformed{"PreviousRound", {with_tag(0)}, "round tag 0 in round 1"},
        Malformed{"NextRound", {with_tag(2)}, "round tag 2 in round 1"},
        Malformed{"RepeatedFirstChunk", {first(6), first(6)}, "repeats a first chunk"},
        Malformed{"TooManyRows", {first(49)}, "announces 49 rows"},
        Malformed{"ChunkAfterTheLast", {first(3), other(1), other(2)}, "round tag 1 in round 2"},
        Malformed{"MoreChunksThanAnnounced", {other(1), other(2), first(3)}, "one more chunk"},
        Malformed{"MoreChunksThanNone", {other(1), first(0)}, "one more chunk"}),
    [](const testing::TestParamInfo<Malformed>& info) { return info.param.name; });

TEST_P(MalformedImmediate, IsAProtocolError) {
  layout_.channels = 1;
  start(3);
  const Shipment pair{0, kDispatch, 1, 0};
  const std::vector<Immediate>& immediates = GetParam().immediates;
  for (size_t i = 0; i + 1 < immediates.size(); ++i) {
    write({.peer = 0, .immediate = immediates[i].encode()}, 1);
    help_until([&] { return proxy_->counters().immediates == i + 1; });
  }
  const RoundWord before = arrival(pair, 1);
  write({.peer = 0, .immediate = immediates.back().encode()}, 1);
  try {
    help_until([] { return false; });
  } catch (const ProtocolError& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().explanation), std::string::npos) << error.what();
  }
  EXPECT_EQ(arrival(pair, 1).encode(), before.encode()) << "nothing may be published";
}

}  // namespace
}  // namespace efa_ep
