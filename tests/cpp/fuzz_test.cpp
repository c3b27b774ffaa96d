// Whatever another rank may have written: immediates, addresses, row lists, flags and rows. Any bytes end in
// a typed error or are taken; none makes this rank crash, or read or write outside of its memory, which the
// address and undefined-behaviour sanitizers watch.
//
// The addresses of LibfabricFabric have the same test in libfabric_address_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "fabric/emulated_fabric.h"
#include "protocol/chunking.h"
#include "protocol/round.h"
#include "protocol/tile_immediate.h"
#include "proxy/proxy.h"
#include "proxy/tile_puts.h"
#include "test_environment.h"
#include "test_memory.h"
#include "testing/emulated_world.h"

namespace efa_ep {
namespace {

class Fuzz : public ::testing::Test {
 protected:
  uint32_t below(uint64_t bound) { return static_cast<uint32_t>(random_() % bound); }
  bool one_in(uint32_t count) { return below(count) == 0; }
  /// Another number, often one that is nearly right.
  uint32_t changed(uint32_t bits) {
    return one_in(4) ? static_cast<uint32_t>(random_()) : bits ^ 1U << below(32);
  }

  const uint64_t seed_ = test_seed(71);
  std::mt19937_64 random_{seed_};
  const ::testing::ScopedTrace trace_{__FILE__, __LINE__, ::testing::Message() << "TEST_SEED=" << seed_};
};

/// Reports the arrivals that a test makes up.
class ArrivalsOnly final : public Fabric {
 public:
  ArrivalsOnly() {
    description_.nics = {"first", "second"};
    description_.send_queue_depth = 16;
    description_.completion_queue_depth = 1 << 20;
    description_.max_write_bytes = 1 << 20;
  }
  void deliver(uint32_t immediate) {
    Completion& arrival = arrivals_.emplace_back();
    arrival.kind = CompletionKind::kArrival;
    arrival.immediate = immediate;
  }

  const FabricDescription& description() const override { return description_; }
  void register_memory(std::byte*, size_t) override {}
  std::vector<std::byte> address() const override { return {}; }
  void connect(uint32_t, std::span<const std::byte>) override {}
  PostResult post_write(const WriteRequest&) override { return PostResult::kAgain; }
  size_t poll(std::span<Completion> completions) override {
    const size_t count = std::min(completions.size(), arrivals_.size());
    std::move(arrivals_.begin(), arrivals_.begin() + static_cast<ptrdiff_t>(count), completions.begin());
    arrivals_.erase(arrivals_.begin(), arrivals_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }

 private:
  FabricDescription description_;
  std::deque<Completion> arrivals_;
};

TEST_F(Fuzz, ImmediatesOfRounds) {
  Layout layout;
  layout.topology = {4, 1};
  layout.row = {.top_k = 1, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 48};
  layout.max_tokens = 40;
  layout.channels = 2;
  uint32_t refused = 0;
  for (uint32_t run = 0; run < amount(500, 50'000) && !HasFailure(); ++run) {
    const TestMemory arena(layout.total_bytes());
    ArrivalsOnly fabric;
    Proxy proxy(fabric, arena.data(), {.layout = layout, .chunk_bytes = 96}, false);
    std::map<size_t, RoundWord> complete;  // by the word's offset
    bool genuine = true;
    Immediate follower;  // more chunks for the last shipment, which may announce too many
    while (genuine) {
      const auto operation = static_cast<Operation>(below(kOperations));
      const uint32_t channel = below(layout.channels);
      const uint32_t source = 1 + below(3);
      const size_t word = layout.arrival(channel, operation, source);
      const RoundWord next{complete[word].round + 1, below(layout.max_tokens + 1)};
      const Chunking chunking =
          Chunking::of(next.rows, layout.row_bytes(operation), proxy.chunk_bytes(), proxy.rails());
      std::vector<uint32_t> chunks(chunking.chunks);
      for (uint32_t chunk = 0; chunk < chunking.chunks; ++chunk) {
        chunks[chunk] = Immediate{.round_tag = next.round % Immediate::kRoundPeriod,
                                  .operation = operation,
                                  .channel = channel,
                                  .source_node = source,
                                  .first = chunk == 0,
                                  .value = chunk == 0 ? next.rows : chunk}
                            .encode();
      }
      follower = {next.round % Immediate::kRoundPeriod, operation, channel, source, false, 1};
      std::shuffle(chunks.begin(), chunks.end(), random_);
      for (uint32_t immediate : chunks) {
        if (one_in(100)) {
          immediate = changed(immediate);
          genuine = false;
        }
        fabric.deliver(immediate);
      }
      while (proxy.help()) {
      }
      if (genuine) complete[word] = next;
    }
    for (uint32_t more = below(100); more > 0; --more) {
      fabric.deliver(one_in(100) ? static_cast<uint32_t>(random_()) : follower.encode());
    }
    while (proxy.help()) {
    }
    try {
      proxy.throw_if_failed();
    } catch (const ProtocolError&) {
      ++refused;
    }
    // What was complete before stays, what came since announces no more rows than there may be.
    for (uint32_t channel = 0; channel < layout.channels; ++channel) {
      for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
        for (uint32_t source = 0; source < layout.topology.nodes(); ++source) {
          uint64_t bits = 0;
          const size_t word = layout.arrival(channel, operation, source);
          std::memcpy(&bits, arena.data() + word, sizeof bits);
          EXPECT_GE(bits >> 32, complete[word].round);
          EXPECT_LE(RoundWord::decode(bits).rows, layout.max_tokens);
          if (RoundWord::decode(bits).round == complete[word].round) {
            EXPECT_EQ(bits, complete[word].encode());
          }
          std::memset(arena.data() + word, 0, sizeof bits);
        }
      }
    }
    EXPECT_TRUE(std::all_of(arena.data(), arena.data() + arena.bytes(),
                            [](std::byte byte) { return byte == std::byte{0}; }));
  }
  EXPECT_GT(refused, 0U);
}

TEST_F(Fuzz, ImmediatesOfTilePuts) {
  constexpr uint32_t kRanks = 5;
  constexpr uint32_t kGroups = 3;
  uint32_t refused = 0;
  for (uint32_t run = 0; run < amount(2000, 200'000) && !HasFailure(); ++run) {
    ArrivalsOnly fabric;
    std::vector<uint64_t> words(TilePuts::words(kRanks, kGroups));
    TilePuts tiles(fabric, words, {.rank = 0, .ranks = kRanks, .groups = kGroups});
    std::map<std::pair<uint32_t, uint32_t>, uint64_t> complete;
    try {
      for (bool genuine = true; genuine;) {
        const uint32_t source = 1 + below(kRanks - 1);
        const uint32_t group = below(kGroups);
        uint64_t& generation = complete[{source, group}];
        const uint32_t writes = 1 + below(6);
        const uint32_t last = below(writes);
        for (uint32_t write = 0; write < writes; ++write) {
          uint32_t immediate = TileImmediate{.source = source,
                                             .generation = static_cast<uint32_t>(generation),
                                             .group = group,
                                             .writes = write == last ? writes : 0}
                                   .encode();
          if (one_in(100)) {
            immediate = changed(immediate);
            genuine = false;
          }
          fabric.deliver(immediate);
        }
        while (tiles.drive()) {
        }
        generation += genuine ? 1 : 0;
        EXPECT_GE(tiles.signal(source, group), generation);
      }
      for (uint32_t more = below(20); more > 0; --more) {
        fabric.deliver(1U << 31 | static_cast<uint32_t>(random_()));
      }
      while (tiles.drive()) {
      }
    } catch (const ProtocolError&) {
      ++refused;
    }
    for (const auto& [key, generations] : complete) {
      EXPECT_GE(tiles.signal(key.first, key.second), generations);
    }
    for (uint32_t group = 0; group < kGroups; ++group) EXPECT_EQ(tiles.signal(0, group), 0U);
  }
  EXPECT_GT(refused, 0U);
}

// An address with wrong bytes is refused, or every write to it ends in a completion.
TEST_F(Fuzz, AddressesOfEmulatedFabrics) {
  uint32_t refused = 0;
  uint32_t failed = 0;
  uint32_t done = 0;
  for (uint32_t run = 0; run < amount(3000, 300'000) && !HasFailure(); ++run) {
    EmulatedNetwork network({.profile = emulated_profile("hostile"), .seed = seed_ + run});
    std::vector<std::byte> source(256);
    std::vector<std::byte> target(256);
    EmulatedFabric from(network, 0);
    EmulatedFabric to(network, 1);
    from.register_memory(source.data(), source.size());
    to.register_memory(target.data(), target.size());
    to.connect(0, from.address());
    std::vector<std::byte> address = to.address();
    for (uint32_t changes = below(4); changes > 0; --changes) {
      // Not only bytes that no address could have.
      if (!one_in(3)) address[16 + below(address.size() - 16)] ^= std::byte(1U << below(8));
      if (one_in(8)) address[below(address.size())] = std::byte(random_());
      if (one_in(16)) address.resize(24 + below(24));
    }
    try {
      from.connect(1, address);
      const WriteRequest request{.peer = 1, .remote_offset = below(512), .bytes = below(257)};
      if (from.post_write(request) == PostResult::kAgain) continue;
    } catch (const ProtocolError&) {
      ++refused;
      continue;
    } catch (const ConfigurationError&) {  // the write leaves the memory that the address speaks of
      ++refused;
      continue;
    }
    while (network.advance()) {
    }
    Completion completion;
    ASSERT_EQ(from.poll({&completion, 1}), 1U);
    ++(completion.kind == CompletionKind::kError ? failed : done);
  }
  EXPECT_GT(refused, 0U);
  EXPECT_GT(failed, 0U);
  EXPECT_GT(done, 0U);
}

/// Random tokens; before some halves, somebody writes anything where ranks read what others wrote. All that
/// the device fills has exactly the size that it may fill.
class Scribbler final : public EmulatedWorkload {
 public:
  Scribbler(const EmulatedWorldOptions& options, uint64_t seed) : options_(options), random_(seed) {}
  void use(EmulatedWorld& world) { world_ = &world; }

  DispatchInput tokens(const EmulatedTurn& turn) override {
    Buffers& buffers = buffers_[turn.rank];
    const RowShape& row = options_.layout.row;
    const auto tokens = static_cast<uint32_t>(random_() % (options_.layout.max_tokens + 1));
    buffers.in.assign(size_t{tokens} * row.payload_bytes, std::byte{1});
    buffers.ids.resize(size_t{tokens} * row.top_k);
    for (int32_t& id : buffers.ids) id = static_cast<int32_t>(random_() % (experts() + 1)) - 1;
    buffers.weights.assign(buffers.ids.size(), 1.0f);
    scribble(turn);
    return {.x = buffers.in.data(),
            .x_stride = row.payload_bytes,
            .ids = buffers.ids.data(),
            .weights = buffers.weights.data(),
            .tokens = tokens};
  }
  DispatchOutput receive(const EmulatedTurn& turn, uint32_t rows) override {
    Buffers& buffers = buffers_[turn.rank];
    const size_t local = world_->device(turn.rank).local_experts();
    const size_t places = options_.per_expert ? local * world_->device(turn.rank).capacity() : rows;
    const uint32_t top_k = options_.layout.row.top_k;
    buffers.x = Bytes(places * options_.layout.row.payload_bytes);
    buffers.rows = Bytes(places * top_k * options_.layout.row.combine_bytes);
    buffers.received_ids = std::vector<int32_t>(size_t{rows} * top_k);
    buffers.received_weights = std::vector<float>(size_t{rows} * top_k);
    buffers.tokens_per_expert = std::vector<int32_t>(local);
    scribble(turn);
    return {.x = buffers.x.data(),
            .ids = buffers.received_ids.data(),
            .weights = buffers.received_weights.data(),
            .tokens_per_expert = buffers.tokens_per_expert.data()};
  }
  CombineInput results(const EmulatedTurn& turn) override {
    scribble(turn);
    return {.rows = buffers_[turn.rank].rows.data(), .per_slot = !options_.per_expert};
  }
  std::byte* output(const EmulatedTurn& turn) override {
    scribble(turn);
    Buffers& buffers = buffers_[turn.rank];
    buffers.out = Bytes(size_t{world_->device(turn.rank).tokens(0)} * options_.layout.row.combine_bytes);
    return buffers.out.data();
  }
  void finished(const EmulatedTurn&) override {}

 private:
  struct Buffers {
    Bytes in, x, rows, out;
    std::vector<int32_t> ids, received_ids, tokens_per_expert;
    std::vector<float> weights, received_weights;
  };
  uint32_t experts() const { return static_cast<uint32_t>(options_.expert_owner.size()); }

  void scribble(const EmulatedTurn& turn) {
    if (random_() % 16 != 0) return;
    const Layout& layout = options_.layout;
    constexpr Section kReadByOthers[] = {Section::kDispatchFlags, Section::kResultFlags,
                                         Section::kRowLists,      Section::kDispatchStaging,
                                         Section::kDispatchSlots, Section::kCombineSlots};
    const Section section = kReadByOthers[random_() % std::size(kReadByOthers)];
    const size_t words = layout.section_bytes(section) / sizeof(uint64_t);
    if (words == 0) return;
    const auto local = static_cast<uint32_t>(random_() % layout.topology.ranks_per_node);
    std::byte* arena = world_->arena(layout.topology.rank_at(layout.topology.node_of(turn.rank), local));
    for (uint64_t changes = 1 + random_() % 8; changes > 0; --changes) {
      // Flags lie far apart; what counts of them is their first two words.
      const bool flag = section == Section::kDispatchFlags || section == Section::kResultFlags;
      const size_t stride = flag ? kWordStride / sizeof(uint64_t) : 1;
      const size_t at = random_() % (words / stride) * stride + (flag ? random_() % 2 : 0);
      const uint64_t bits = word(turn, flag);
      std::memcpy(arena + layout.section_offset(0, section) + at * sizeof bits, &bits, sizeof bits);
    }
  }
  uint64_t word(const EmulatedTurn& turn, bool flag) {
    const Layout& layout = options_.layout;
    const auto near_limit = static_cast<uint32_t>(random_() % (2 * layout.result_rows() + 2));
    if (random_() % 4 == 0) return random_();
    if (flag) return RoundWord{turn.round + static_cast<uint32_t>(random_() % 2), near_limit}.encode();
    const auto id = static_cast<uint32_t>(random_() % (experts() + 2)) - 1;
    return uint64_t{id} << 32 | (random_() % 2 == 0 ? id : near_limit);
  }

  const EmulatedWorldOptions options_;
  std::mt19937_64 random_;
  EmulatedWorld* world_ = nullptr;
  std::map<uint32_t, Buffers> buffers_;
};

TEST_F(Fuzz, MemoryThatRanksShare) {
  uint32_t refused = 0;
  uint32_t timed_out = 0;
  uint32_t finished = 0;
  for (uint32_t run = 0; run < amount(400, 40'000) && !HasFailure(); ++run) {
    EmulatedWorldOptions options;
    const uint32_t ranks_per_node = 1 + below(3);
    options.layout.topology = {(1 + below(3)) * ranks_per_node, ranks_per_node};
    options.layout.row = {.top_k = 3, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 32};
    options.layout.max_tokens = 1 + below(4);
    options.per_expert = one_in(2);
    options.chunk_bytes = 64;
    options.ring_commands = 256;
    options.network = {.profile = emulated_profile("p5en"), .seed = seed_ + run};
    for (uint32_t expert = 0; expert < 2 * options.layout.topology.world; ++expert) {
      options.expert_owner.push_back(expert % options.layout.topology.world);
    }
    EmulatedWorld world(options);
    Scribbler scribbler(options, seed_ + run);
    scribbler.use(world);
    world.run(scribbler, 4);
    for (uint32_t rank = 0; rank < options.layout.topology.world; ++rank) {
      try {
        if (world.error(rank)) std::rethrow_exception(world.error(rank));
        ++finished;
      } catch (const ProtocolError&) {
        ++refused;
      } catch (const RankTimeoutError&) {
        ++timed_out;
      } catch (const std::exception& error) {
        ADD_FAILURE() << "run " << run << ", rank " << rank << ": " << error.what();
      }
    }
  }
  EXPECT_GT(refused, 0U);
  EXPECT_GT(timed_out, 0U);
  EXPECT_GT(finished, 0U);
}

}  // namespace
}  // namespace efa_ep
