// The proxy alone on an emulated network: commands in, slots and arrival words out, deadlines in virtual
// time.
#include <gtest/gtest.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "emulated_fixture.h"
#include "errors.h"
#include "protocol/chunking.h"
#include "protocol/round.h"
#include "proxy/proxy.h"

namespace efa_ep {
namespace {

/// Nodes of one rank each, every one with a proxy that the test drives.
class EmulatedProxies : public ::testing::Test {
 protected:
  static constexpr uint64_t kChunkBytes = 128;
  static constexpr uint32_t kRows = 40;

  void start(uint32_t nodes, const EmulatedProfile& profile) {
    layout_.topology = {nodes, 1};
    layout_.row = {.top_k = 1, .payload_bytes = 48, .scale_bytes = 0, .combine_bytes = 64};
    layout_.max_tokens = kRows;
    network_.emplace(EmulatedNetworkOptions{.profile = profile, .seed = seed_, .check_sources = true});
    for (uint32_t rank = 0; rank < nodes; ++rank) {
      arenas_.emplace_back(layout_.total_bytes());
      fabrics_.push_back(std::make_unique<EmulatedFabric>(*network_, rank));
      fabrics_[rank]->register_memory(arenas_[rank].data(), arenas_[rank].bytes());
    }
    for (uint32_t rank = 0; rank < nodes; ++rank) {
      for (uint32_t peer = 0; peer < nodes; ++peer) {
        if (peer != rank) fabrics_[rank]->connect(peer, fabrics_[peer]->address());
      }
      ProxyOptions options;
      options.layout = layout_;
      options.rank = rank;
      options.chunk_bytes = kChunkBytes;
      options.timeout = 3ms;
      options.clock = &network_->clock();
      proxies_.push_back(std::make_unique<Proxy>(*fabrics_[rank], arenas_[rank].data(), options, false));
    }
  }

  /// What a device does in dispatch_send: stages `rows` rows for a node and hands their chunks over.
  void send(uint32_t source, uint32_t target, uint32_t round, uint32_t rows) {
    const size_t row_bytes = layout_.dispatch_row();
    const uint32_t staged = layout_.staged_row(source, target);
    std::byte* staging = arenas_[source].data() + layout_.outgoing(0, Operation::kDispatch);
    std::fill_n(staging + staged * row_bytes, rows * row_bytes, content(source, round));
    const Chunking cut =
        Chunking::of(rows, row_bytes, proxies_[source]->chunk_bytes(), proxies_[source]->rails());
    for (uint32_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const Immediate immediate{.round_tag = round,
                                .operation = Operation::kDispatch,
                                .source_node = source,
                                .first = chunk == 0,
                                .value = chunk == 0 ? rows : chunk};
      ASSERT_TRUE(proxies_[source]->try_submit({.immediate = immediate.encode(),
                                                .destination_node = static_cast<uint16_t>(target),
                                                .local_row = staged + cut.first_row(chunk),
                                                .first_row = static_cast<uint16_t>(cut.first_row(chunk)),
                                                .rows = static_cast<uint16_t>(cut.rows_in(chunk))}));
    }
  }
  static std::byte content(uint32_t source, uint32_t round) {
    return static_cast<std::byte>(1 + source * 16 + round);
  }
  RoundWord arrived(uint32_t rank, uint32_t source) {
    auto* word =
        reinterpret_cast<uint64_t*>(arenas_[rank].data() + layout_.arrival(0, Operation::kDispatch, source));
    return RoundWord::decode(std::atomic_ref<uint64_t>(*word).load(std::memory_order_acquire));
  }
  /// Whether the slot holds a round's rows, all of them.
  bool slot_holds(uint32_t rank, uint32_t source, uint32_t round, uint32_t rows) {
    const std::byte* slot = arenas_[rank].data() + layout_.slot(0, Operation::kDispatch, rank, source);
    return static_cast<size_t>(std::count(slot, slot + rows * layout_.dispatch_row(),
                                          content(source, round))) == rows * layout_.dispatch_row();
  }
  void help_all() {
    for (bool moved = true; moved;) {
      moved = false;
      for (const auto& proxy : proxies_) moved |= proxy->help();
    }
  }

  const uint64_t seed_ = test_seed(71);
  Layout layout_;
  std::optional<EmulatedNetwork> network_;
  std::vector<TestMemory> arenas_;
  std::vector<std::unique_ptr<EmulatedFabric>> fabrics_;
  std::vector<std::unique_ptr<Proxy>> proxies_;
  const ::testing::ScopedTrace trace_{__FILE__, __LINE__, replay(seed_)};
};

// In every moment between two events: a word that says a pair is complete is right about it.
TEST_F(EmulatedProxies, TheArrivalWordComesWithTheLastByte) {
  constexpr uint32_t kNodes = 4;
  start(kNodes, emulated_profile("hostile"));
  for (uint32_t round = 1; round <= 5; ++round) {
    const auto rows_of = [&](uint32_t source) { return (source * 13 + round * 7) % (kRows + 1); };
    for (uint32_t source = 0; source < kNodes; ++source) {
      for (uint32_t target = 0; target < kNodes; ++target) {
        if (target != source) send(source, target, round, rows_of(source));
      }
    }
    uint32_t complete = 0;
    do {
      help_all();
      complete = 0;
      for (uint32_t rank = 0; rank < kNodes; ++rank) {
        for (uint32_t source = 0; source < kNodes; ++source) {
          if (source == rank || arrived(rank, source).round != round) continue;
          EXPECT_EQ(arrived(rank, source).rows, rows_of(source));
          EXPECT_TRUE(slot_holds(rank, source, round, rows_of(source)));
          ++complete;
        }
      }
    } while (network_->advance());
    EXPECT_EQ(complete, kNodes * (kNodes - 1));
  }
  for (uint32_t rank = 0; rank < kNodes; ++rank) {
    EXPECT_TRUE(proxies_[rank]->unfinished_destinations().empty());
    EXPECT_EQ(proxies_[rank]->counters().immediates, network_->counters(rank).arrived);
    EXPECT_GT(proxies_[rank]->counters().retries, 0U) << "the queue of 4 was never full";
    EXPECT_EQ(network_->counters(rank).changed_sources, 0U);
  }
}

// The deadline of a refused write is virtual: an hour takes no time, and no time passes without the network.
TEST_F(EmulatedProxies, ARefusedWriteFailsWhenVirtualTimeIsUp) {
  start(2, emulated_profile("p5en"));
  network_->inject({.kind = FaultKind::kRefusePosts, .rank = 0});
  send(0, 1, 1, 3);
  for (int i = 0; i < 1000; ++i) help_all();
  EXPECT_NO_THROW(proxies_[0]->throw_if_failed());
  network_->advance_to(3ms);
  help_all();
  EXPECT_NO_THROW(proxies_[0]->throw_if_failed());
  network_->advance_to(3ms + 1ns);
  help_all();
  try {
    proxies_[0]->throw_if_failed();
    ADD_FAILURE() << "no error";
  } catch (const TransportError& error) {
    EXPECT_EQ(error.peer, 1);
  }
}

TEST_F(EmulatedProxies, AFailedWriteNamesItsPeer) {
  start(3, emulated_profile("p5en"));
  network_->inject({.kind = FaultKind::kDie, .rank = 2, .after_death = AfterDeath::kUnreachable});
  send(0, 1, 1, 3);
  send(0, 2, 1, 3);
  do help_all();
  while (network_->advance());
  EXPECT_TRUE(slot_holds(1, 0, 1, 3));
  try {
    proxies_[0]->throw_if_failed();
    ADD_FAILURE() << "no error";
  } catch (const TransportError& error) {
    EXPECT_EQ(error.peer, 2);
    EXPECT_NE(std::string(error.what()).find("UNREACH_REMOTE"), std::string::npos) << error.what();
  }
}

// An acknowledgement comes from the target's NIC, so a source never learns that the target's process stands
// still. All that it may send meanwhile has to fit into the target's completion queue, and does, in the
// smallest queue that a proxy accepts.
TEST_F(EmulatedProxies, AFrozenTargetIsNotOverrun) {
  EmulatedProfile profile = emulated_profile("p5en");
  profile.nics = 1;
  profile.send_queue_depth = 4;
  profile.completion_queue_depth = profile.send_queue_depth + 3 * 2;  // a chunk of each source and operation
  start(4, profile);
  network_->inject({.kind = FaultKind::kFreeze, .rank = 0, .duration = 1ms});
  for (const uint32_t source : {1u, 2u, 3u}) send(source, 0, 1, kRows);
  do help_all();
  while (network_->advance());
  for (const uint32_t source : {1u, 2u, 3u}) EXPECT_TRUE(slot_holds(0, source, 1, kRows));
  for (const auto& proxy : proxies_) EXPECT_NO_THROW(proxy->throw_if_failed());
  EXPECT_EQ(arrived(0, 3).rows, kRows);
}

}  // namespace
}  // namespace efa_ep
