// Rounds and tile puts through one proxy and one fabric: neither takes the other's completions, and each
// arrives whole.
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "loopback_network.h"
#include "protocol/chunking.h"
#include "protocol/round.h"
#include "proxy/proxy.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {
namespace {

constexpr uint32_t kRows = 24;
constexpr uint64_t kChunkBytes = 200;
constexpr uint32_t kTiles = 8;
constexpr uint32_t kTileBytes = 512;

/// Two nodes of one rank each; behind the layout's sections lie the tiles to send, then those received.
class ProxyTiles : public ::testing::Test {
 protected:
  ProxyTiles() {
    layout_.topology = {2, 1};
    layout_.row = {.top_k = 1, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 48};
    layout_.max_tokens = kRows;
    tiles_at_ = align_up(layout_.total_bytes(), kSectionAlignment);
    for (uint32_t rank = 0; rank < 2; ++rank) {
      memory_.emplace_back(tiles_at_ + 2 * kTiles * kTileBytes);
      network_.endpoint(rank).register_memory(memory_[rank].data(), memory_[rank].bytes());
      words_.emplace_back(TilePuts::words(2, 1));
    }
  }
  void start(bool with_thread) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      Fabric& fabric = network_.endpoint(rank);
      fabric.connect(1 - rank, network_.endpoint(1 - rank).address());
      tiles_.push_back(std::make_unique<TilePuts>(
          fabric, words_[rank], TilePutOptions{.rank = rank, .ranks = 2, .chunk_bytes = kChunkBytes}));
      const ProxyOptions options{
          .layout = layout_, .rank = rank, .chunk_bytes = kChunkBytes, .tiles = tiles_[rank].get()};
      proxies_.push_back(std::make_unique<Proxy>(fabric, memory_[rank].data(), options, with_thread));
    }
  }

  /// Sends a dispatch of kRows rows and kTiles tiles, in turns.
  void send(uint32_t rank, uint32_t round) {
    const uint32_t peer = 1 - rank;
    const uint64_t row = layout_.row_bytes(Operation::kDispatch);
    std::byte* staging = memory_[rank].data() + layout_.outgoing(0, Operation::kDispatch);
    for (uint64_t i = 0; i < kRows * row; ++i) staging[i] = content(rank, round, i);
    std::byte* tiles = memory_[rank].data() + tiles_at_;
    for (uint64_t i = 0; i < kTiles * kTileBytes; ++i) tiles[i] = content(rank, round + 100, i);

    const Chunking cut = Chunking::of(kRows, row, kChunkBytes, 1);
    for (uint32_t i = 0; i < std::max(cut.chunks, kTiles); ++i) {
      if (i < cut.chunks) {
        const Immediate immediate{.round_tag = round % Immediate::kRoundPeriod,
                                  .source_node = rank,
                                  .first = i == 0,
                                  .value = i == 0 ? kRows : i};
        const Command command{.immediate = immediate.encode(),
                              .destination_node = static_cast<uint16_t>(peer),
                              .local_row = cut.first_row(i),
                              .first_row = static_cast<uint16_t>(cut.first_row(i)),
                              .rows = static_cast<uint16_t>(cut.rows_in(i))};
        wait([&] { return proxies_[rank]->try_submit(command); });
      }
      if (i < kTiles) {
        const uint64_t at = tiles_at_ + uint64_t{i} * kTileBytes;
        const TilePut put{.peer = peer,
                          .transfers = kTiles,
                          .bytes = kTileBytes,
                          .local_offset = at,
                          .remote_offset = at + kTiles * kTileBytes};
        wait([&] { return proxies_[rank]->try_put(put); });
      }
    }
  }
  /// Waits for both, and checks every byte.
  void receive(uint32_t rank, uint32_t round) {
    const uint32_t peer = 1 - rank;
    wait([&] { return tiles_[rank]->signal(peer, 0) >= round && arrived(rank) >= round; });
    const std::byte* rows = memory_[rank].data() + layout_.slot(0, Operation::kDispatch, rank, peer);
    for (uint64_t i = 0; i < kRows * layout_.row_bytes(Operation::kDispatch); ++i) {
      ASSERT_EQ(rows[i], content(peer, round, i)) << "row byte " << i;
    }
    const std::byte* tiles = memory_[rank].data() + tiles_at_ + kTiles * kTileBytes;
    for (uint64_t i = 0; i < kTiles * kTileBytes; ++i) {
      ASSERT_EQ(tiles[i], content(peer, round + 100, i)) << "tile byte " << i;
    }
  }

  uint32_t arrived(uint32_t rank) {
    auto* word = reinterpret_cast<uint64_t*>(memory_[rank].data() +
                                             layout_.arrival(0, Operation::kDispatch, 1 - rank));
    return RoundWord::decode(std::atomic_ref<uint64_t>(*word).load(std::memory_order_acquire)).round;
  }
  void wait(const std::function<bool()>& done) {
    const Patience patience;
    while (!done()) {
      for (const auto& proxy : proxies_) {
        if (help_) proxy->help();
        proxy->throw_if_failed();
      }
      patience.check();
      sched_yield();
    }
  }
  static std::byte content(uint32_t rank, uint32_t round, uint64_t at) {
    return std::byte(rank * 89 + round * 31 + at * 7 + (at >> 8) + 1);
  }

  Layout layout_;
  uint64_t tiles_at_ = 0;
  bool help_ = false;
  LoopbackNetwork network_{{.send_queue_depth = 4, .seed = test_seed(1)}};
  std::vector<TestMemory> memory_;
  std::vector<std::vector<uint64_t>> words_;
  std::vector<std::unique_ptr<TilePuts>> tiles_;
  std::vector<std::unique_ptr<Proxy>> proxies_;
};

TEST_F(ProxyTiles, ShareTheFabricWithRounds) {
  for (const bool with_thread : {false, true}) {
    proxies_.clear();
    tiles_.clear();
    for (auto& words : words_) std::fill(words.begin(), words.end(), 0);
    for (auto& memory : memory_) std::fill_n(memory.data(), memory.bytes(), std::byte{0});
    help_ = !with_thread;
    start(with_thread);
    for (uint32_t round = 1; round <= 5; ++round) {
      for (const uint32_t rank : {0u, 1u}) send(rank, round);
      for (const uint32_t rank : {0u, 1u}) receive(rank, round);
      // All of it is posted, or drain() would throw: what is left to do is the loopback's.
      for (const uint32_t rank : {0u, 1u}) proxies_[rank]->drain(kPatience);
    }
    for (const uint32_t rank : {0u, 1u}) {
      EXPECT_TRUE(tiles_[rank]->idle());
      EXPECT_EQ(tiles_[rank]->sent(1 - rank, 0), 5u);
      EXPECT_EQ(tiles_[rank]->counters().transfers, 5u * kTiles);
      EXPECT_EQ(tiles_[rank]->counters().completions, tiles_[rank]->counters().writes);
      EXPECT_EQ(proxies_[rank]->counters().completions, proxies_[rank]->counters().writes);
    }
  }
}

TEST_F(ProxyTiles, AreRefusedWhereNobodyExpectsThem) {
  network_.endpoint(0).connect(1, network_.endpoint(1).address());
  network_.endpoint(1).connect(0, network_.endpoint(0).address());
  Proxy proxy(network_.endpoint(0), memory_[0].data(), {.layout = layout_}, /*start_thread=*/false);
  const TileImmediate immediate{.source = 1};
  ASSERT_EQ(network_.endpoint(1).post_write({.peer = 0, .immediate = immediate.encode()}),
            PostResult::kPosted);
  const Patience patience;
  EXPECT_THROW(
      while (true) {
        proxy.help();
        proxy.throw_if_failed();
        patience.check();
      },
      ProtocolError);
}

}  // namespace
}  // namespace efa_ep
