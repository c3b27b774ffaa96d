// The codecs, cuts, offsets and roles of csrc/protocol, against their definitions in words.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "protocol/chunking.h"
#include "protocol/immediate.h"
#include "protocol/layout.h"
#include "protocol/limits.h"
#include "protocol/round.h"
#include "protocol/row.h"
#include "protocol/topology.h"

namespace efa_ep {
namespace {

constexpr uint64_t kSeed = 20240611;

std::mt19937_64 seeded_random() {
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  return std::mt19937_64(kSeed);
}
uint32_t pick(std::mt19937_64& random, uint32_t least, uint32_t most) {
  return std::uniform_int_distribution<uint32_t>(least, most)(random);
}

// ---- immediate.h

constexpr Immediate kFullImmediate{.round_tag = 31,
                                   .operation = Operation::kCombine,
                                   .channel = 1,
                                   .source_node = 127,
                                   .first = true,
                                   .value = 0xFFFF};
static_assert(kFullImmediate.encode() == 0x7FFFFFFF);
static_assert(Immediate::decode(0x7FFFFFFF) == kFullImmediate);
static_assert(Immediate{}.encode() == 0);
static_assert(Immediate{.first = true, .value = 9}.chunk() == 0);
static_assert(Immediate{.first = false, .value = 9}.chunk() == 9);

TEST(Immediate, LiesWhereTheDrawingSays) {
  EXPECT_EQ(Immediate{.round_tag = 1}.encode(), 1u << 26);
  EXPECT_EQ(Immediate{.operation = Operation::kCombine}.encode(), 1u << 25);
  EXPECT_EQ(Immediate{.channel = 1}.encode(), 1u << 24);
  EXPECT_EQ(Immediate{.source_node = 1}.encode(), 1u << 17);
  EXPECT_EQ(Immediate{.first = true}.encode(), 1u << 16);
  EXPECT_EQ(Immediate{.value = 1}.encode(), 1u);
}

TEST(Immediate, ComesBackForTheExtremesOfEveryField) {
  for (const uint32_t round_tag : {0u, 1u, Immediate::kRoundPeriod - 1}) {
    for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
      for (const uint32_t channel : {0u, kMaxChannels - 1}) {
        for (const uint32_t source_node : {0u, 1u, kMaxNodes - 1}) {
          for (const bool first : {false, true}) {
            for (const uint32_t value : {0u, 1u, kMaxTokensPerRank}) {
              const Immediate immediate{round_tag, operation, channel, source_node, first, value};
              EXPECT_EQ(Immediate::decode(immediate.encode()), immediate);
            }
          }
        }
      }
    }
  }
}

TEST(Immediate, ComesBackForRandomFieldsAndBits) {
  auto random = seeded_random();
  for (int i = 0; i < 100'000; ++i) {
    const Immediate immediate{pick(random, 0, Immediate::kRoundPeriod - 1),
                              pick(random, 0, 1) == 0 ? Operation::kDispatch : Operation::kCombine,
                              pick(random, 0, kMaxChannels - 1),
                              pick(random, 0, kMaxNodes - 1),
                              pick(random, 0, 1) == 1,
                              pick(random, 0, kMaxTokensPerRank)};
    ASSERT_EQ(Immediate::decode(immediate.encode()), immediate) << "seed " << kSeed << ", case " << i;
    const auto bits = static_cast<uint32_t>(random()) & 0x7FFFFFFF;
    ASSERT_EQ(Immediate::decode(bits).encode(), bits) << "seed " << kSeed << ", case " << i;
  }
}

TEST(Immediate, TagsARoundWithItsLowBits) {
  constexpr uint32_t kPeriod = Immediate::kRoundPeriod;
  const Immediate late{.round_tag = 5 * kPeriod + 3, .source_node = 2, .value = 1};
  EXPECT_EQ(late.encode(), (Immediate{.round_tag = 3, .source_node = 2, .value = 1}.encode()));
}

// ---- chunking.h

TEST(Chunking, PartitionsTheRowsIntoNearlyEqualChunks) {
  auto random = seeded_random();
  for (int i = 0; i < 20'000; ++i) {
    const uint32_t rows = i % 50 == 0 ? kMaxTokensPerRank : pick(random, 0, i % 2 == 0 ? 40 : 5000);
    const uint64_t row_bytes = 16 * pick(random, 1, 2000);
    const uint64_t chunk_bytes = pick(random, 1, 1 << 21);
    const uint32_t rails = pick(random, 1, 16);
    const Chunking cut = Chunking::of(rows, row_bytes, chunk_bytes, rails);
    SCOPED_TRACE("seed " + std::to_string(kSeed) + ": " + std::to_string(rows) + " rows of " +
                 std::to_string(row_bytes) + " B, chunks of " + std::to_string(chunk_bytes) + " B, " +
                 std::to_string(rails) + " rails");
    uint32_t next = 0;
    uint32_t fewest = rows;
    uint32_t most = 0;
    for (uint32_t chunk = 0; chunk < cut.chunks; ++chunk) {
      ASSERT_EQ(cut.first_row(chunk), next);
      const uint32_t count = cut.rows_in(chunk);
      if (rows > 0) {
        ASSERT_GE(count, 1u);
        // Less than a row above one and a half, so that the longest write is known beforehand.
        ASSERT_LT(2 * (count - 1) * row_bytes, 3 * chunk_bytes) << count << " rows in chunk " << chunk;
      }
      fewest = std::min(fewest, count);
      most = std::max(most, count);
      next += count;
    }
    ASSERT_EQ(next, rows);
    ASSERT_LE(most - fewest, 1u);
  }
}

// By trying: no other number of chunks brings their mean nearer to one chunk's worth, in units of chunks.
TEST(Chunking, HasTheNumberOfChunksThatBytesAreNearestTo) {
  auto random = seeded_random();
  for (int i = 0; i < 20'000; ++i) {
    const uint32_t rows = pick(random, 1, 500);
    const uint64_t row_bytes = 16 * pick(random, 1, 2000);
    const uint64_t chunk_bytes = pick(random, 1, 1 << 20);
    const uint32_t rails = pick(random, 1, 16);
    const auto distance = [&](uint32_t chunks) {
      return std::abs(static_cast<double>(rows * row_bytes) - static_cast<double>(chunks * chunk_bytes));
    };
    uint32_t nearest = 1;
    while (nearest < rows && distance(nearest + 1) <= distance(nearest)) ++nearest;
    EXPECT_EQ(Chunking::of(rows, row_bytes, chunk_bytes, rails).chunks,
              std::min(rows, std::max(nearest, rails)))
        << "seed " << kSeed << ": " << rows << " rows of " << row_bytes << " B, chunks of " << chunk_bytes
        << " B, " << rails << " rails";
  }
}

// What buffers and queues are sized by is the number of chunks of the most rows.
TEST(Chunking, NeverNeedsFewerChunksForMoreRows) {
  for (const uint64_t row_bytes : {16u, 48u, 7472u, 14336u}) {
    for (const uint64_t chunk_bytes : {1u, 100u, 8192u, 131072u}) {
      for (uint32_t rows = 1; rows <= 300; ++rows) {
        EXPECT_LE(Chunking::of(rows - 1, row_bytes, chunk_bytes, 2).chunks,
                  Chunking::of(rows, row_bytes, chunk_bytes, 2).chunks);
      }
    }
  }
}

TEST(Chunking, GivesEveryRailAShareIfThereAreEnoughRows) {
  for (uint32_t rails = 1; rails <= 16; ++rails) {
    for (uint32_t rows = 0; rows <= 64; ++rows) {
      EXPECT_EQ(Chunking::of(rows, 16, 1 << 20, rails).chunks, std::clamp(rows, 1u, rails));
    }
  }
}

TEST(Chunking, SignalsAnEmptyPairWithOneEmptyChunk) {
  constexpr Chunking kEmpty = Chunking::of(0, 7472, 1 << 18, 4);
  static_assert(kEmpty.chunks == 1 && kEmpty.first_row(0) == 0 && kEmpty.rows_in(0) == 0);
}

TEST(Chunking, NumbersEveryChunkWithinTheImmediate) {
  static_assert(Chunking::of(kMaxTokensPerRank, 1 << 20, 1, 1).chunks - 1 <= 0xFFFF);
}

// 64 ranks on 8 nodes, 128 tokens, 8 of 256 experts at random: 84.6 rows for a node on average, and between
// 74 and 95 for 19 of 20 pairs. The promise is about what ranks write, not about the average pair.
TEST(Chunking, NeedsTheWritesPerLayerThatTheDesignPromises) {
  constexpr RowShape kRow{.top_k = 8, .payload_bytes = 7168, .scale_bytes = 224, .combine_bytes = 14336};
  const auto writes = [&](uint64_t chunk_bytes) {
    double sum = 0;
    for (uint32_t rows = 74; rows <= 95; ++rows) {
      sum += 7 * (Chunking::of(rows, kRow.dispatch_bytes(), chunk_bytes, 2).chunks +
                  Chunking::of(rows, kRow.combine_bytes, chunk_bytes, 2).chunks);
    }
    return sum / (95 - 74 + 1);
  };
  EXPECT_EQ(writes(uint64_t{1} << 30), 28.0);
  EXPECT_LE(writes(256 * 1024), 56.0);
  EXPECT_LE(writes(128 * 1024), 105.0);
}

/// Most minus least.
uint32_t spread(const std::vector<uint32_t>& load) {
  const auto [least, most] = std::minmax_element(load.begin(), load.end());
  return *most - *least;
}

// A small round has one chunk per pair, so the chunks with one index must be balanced by themselves.
TEST(Rails, ShareTheLoadOfEveryReceiverAndEverySender) {
  for (const uint32_t rails : {1u, 2u, 3u, 4u, 8u}) {
    for (uint32_t nodes = 2; nodes <= 32; ++nodes) {
      for (uint32_t self = 0; self < nodes; ++self) {
        for (uint32_t chunk = 0; chunk < 2 * rails; ++chunk) {
          std::vector<uint32_t> received(rails, 0);
          std::vector<uint32_t> sent(rails, 0);
          for (uint32_t other = 0; other < nodes; ++other) {
            if (other == self) continue;
            ++received.at(rail_of(other, self, nodes, chunk, rails));
            ++sent.at(rail_of(self, other, nodes, chunk, rails));
          }
          ASSERT_LE(std::max(spread(received), spread(sent)), 1u)
              << nodes << " nodes, node " << self << ", chunk " << chunk << ", " << rails << " rails";
        }
      }
    }
  }
}

// A pair whose chunks are a multiple of the NICs loads each of them equally.
TEST(Rails, ShareTheLoadOfEveryPair) {
  for (const uint32_t rails : {1u, 2u, 3u, 4u, 8u}) {
    for (uint32_t node = 1; node < 32; ++node) {
      std::vector<uint32_t> load(rails, 0);
      for (uint32_t chunk = 0; chunk < 3 * rails; ++chunk) ++load.at(rail_of(0, node, 32, chunk, rails));
      ASSERT_EQ(spread(load), 0u) << "node " << node << ", " << rails << " rails";
    }
  }
}

// ---- round.h

static_assert(RoundWord::decode(RoundWord{.round = 7, .rows = 9}.encode()).round == 7);
static_assert(RoundWord::decode(RoundWord{.round = 7, .rows = 9}.encode()).rows == 9);
static_assert(RoundWord::decode(0).round == 0, "a fresh word announces no round: they count from 1");

TEST(RoundWord, GrowsWithTheRoundWhateverTheRows) {
  auto random = seeded_random();
  for (int i = 0; i < 10'000; ++i) {
    const uint32_t round = i == 0 ? 0xFFFFFFFE : pick(random, 0, 0xFFFFFFFE);
    const RoundWord before{round, pick(random, 0, kMaxTokensPerRank)};
    const RoundWord after{round + 1, pick(random, 0, kMaxTokensPerRank)};
    EXPECT_LT(before.encode(), after.encode()) << "seed " << kSeed;
    EXPECT_EQ(RoundWord::decode(before.encode()).round, before.round);
    EXPECT_EQ(RoundWord::decode(before.encode()).rows, before.rows);
  }
}

// ---- row.h

TEST(RowShape, KeepsFieldsApartAndAligned) {
  for (uint32_t top_k = 1; top_k <= kMaxTopK; ++top_k) {
    for (const uint32_t payload : {16u, 48u, 4096u, 14336u}) {
      for (const uint32_t scales : {0u, 4u, 56u, 224u}) {
        const RowShape row{top_k, payload, scales, 16};
        EXPECT_GE(RowShape::ids_offset(), RowShape::token_offset() + sizeof(uint32_t));
        EXPECT_EQ(row.weights_offset(), RowShape::ids_offset() + top_k * sizeof(int32_t));
        EXPECT_GE(row.payload_offset(), row.weights_offset() + top_k * sizeof(float));
        EXPECT_LT(row.payload_offset(), row.weights_offset() + top_k * sizeof(float) + kRowAlignment);
        EXPECT_EQ(row.payload_offset() % kRowAlignment, 0u);
        EXPECT_GE(row.scales_offset(), row.payload_offset() + payload);
        EXPECT_EQ(row.scales_offset() % alignof(float), 0u);
        EXPECT_GE(row.dispatch_bytes(), row.scales_offset() + scales);
        EXPECT_LT(row.dispatch_bytes(), row.scales_offset() + scales + kRowAlignment);
        EXPECT_EQ(row.dispatch_bytes() % kRowAlignment, 0u);
      }
    }
  }
}

// ---- layout.h

/// Bytes that one indexed object of the layout occupies, and the section it belongs to.
struct Placed {
  size_t first = 0;
  size_t bytes = 0;
  Section section = Section::kArrivals;
};

std::vector<Placed> everything(const Layout& layout, uint32_t channel, uint32_t rank) {
  const Topology& topology = layout.topology;
  const uint32_t self = topology.node_of(rank);
  const uint32_t index = topology.index_of(rank);
  const size_t dispatch_slot = layout.max_tokens * layout.row.dispatch_bytes();
  const size_t combine_slot = size_t{layout.max_tokens} * layout.row.combine_bytes;
  std::vector<Placed> all;
  for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
    const bool dispatch = operation == Operation::kDispatch;
    const size_t slot = dispatch ? dispatch_slot : combine_slot;
    all.push_back({layout.completion(channel, operation), kWordStride, Section::kCompletions});
    for (uint32_t node = 0; node < topology.nodes(); ++node) {
      all.push_back({layout.arrival(channel, operation, node), kWordStride, Section::kArrivals});
      if (node == self) continue;
      if (dispatch || topology.ranks_per_node > 1) {
        all.push_back({layout.outgoing(channel, operation) +
                           layout.staged_row(self, node) * layout.row_bytes(operation),
                       slot, dispatch ? Section::kDispatchStaging : Section::kCombineStaging});
      }
      all.push_back({layout.slot(channel, operation, self, node), slot,
                     dispatch ? Section::kDispatchSlots : Section::kCombineSlots});
    }
  }
  for (uint32_t other = 0; other < topology.world; ++other) {
    if (topology.index_of(other) == index && other != rank) continue;  // its rows lie in a slot
    const size_t block = layout.block(index, topology.node_of(other), topology.index_of(other));
    all.push_back({layout.dispatch_flag(channel, block), kWordStride, Section::kDispatchFlags});
    all.push_back({layout.result_flag(channel, block), kWordStride, Section::kResultFlags});
  }
  for (uint32_t node = 0; node < topology.nodes(); ++node) {
    for (uint32_t owner = 0; owner < topology.ranks_per_node; ++owner) {
      all.push_back(
          {layout.row_list(channel, node, owner), 4 * size_t{layout.max_tokens}, Section::kRowLists});
    }
  }
  all.push_back(
      {layout.activations(channel) - layout.row.payload_offset(), dispatch_slot, Section::kDispatchStaging});
  all.push_back({layout.results(channel), topology.world * combine_slot, Section::kResults});
  return all;
}

const std::vector<std::pair<uint32_t, uint32_t>> kShapes = {{1, 1}, {1, 2}, {1, 8}, {2, 1}, {5, 1},
                                                            {2, 2}, {3, 2}, {2, 3}, {3, 5}, {8, 8}};
const std::vector<RowShape> kRows = {{1, 16, 0, 16}, {6, 4096, 0, 4096}, {8, 7168, 224, 14336}};

TEST(Layout, FillsEverySectionExactlyAndWithoutOverlap) {
  for (const auto& [nodes, ranks_per_node] : kShapes) {
    for (const RowShape& row : kRows) {
      for (const uint32_t max_tokens : {1u, 3u, 128u}) {
        const Layout layout{{nodes * ranks_per_node, ranks_per_node}, row, max_tokens, kMaxChannels};
        for (const uint32_t rank : {0u, layout.topology.world / 2, layout.topology.world - 1}) {
          SCOPED_TRACE(std::to_string(nodes) + " x " + std::to_string(ranks_per_node) + ", rank " +
                       std::to_string(rank) + ", " + std::to_string(max_tokens) + " tokens of " +
                       std::to_string(row.payload_bytes) + " B");
          std::vector<size_t> used(kMaxChannels * kSections, 0);
          std::vector<std::pair<size_t, size_t>> ranges;
          for (uint32_t channel = 0; channel < kMaxChannels; ++channel) {
            for (const Placed& placed : everything(layout, channel, rank)) {
              const size_t start = layout.section_offset(channel, placed.section);
              ASSERT_GE(placed.first, start);
              ASSERT_LE(placed.first + placed.bytes, start + layout.section_bytes(placed.section));

              ASSERT_EQ(placed.first % (placed.section == Section::kRowLists ? 4 : kRowAlignment), 0u);
              used[channel * kSections + static_cast<uint32_t>(placed.section)] += placed.bytes;
              ranges.emplace_back(placed.first, placed.first + placed.bytes);
            }
            for (uint32_t s = 0; s < kSections; ++s) {
              EXPECT_EQ(used[channel * kSections + s], layout.section_bytes(static_cast<Section>(s)))
                  << kSectionNames[s];
            }
          }
          std::sort(ranges.begin(), ranges.end());
          for (size_t i = 1; i < ranges.size(); ++i) ASSERT_GE(ranges[i].first, ranges[i - 1].second);
          EXPECT_LE(ranges.back().second, layout.total_bytes());
        }
      }
    }
  }
}

TEST(Layout, PutsSectionsOnPagesOneAfterTheOther) {
  for (const auto& [nodes, ranks_per_node] : kShapes) {
    const Layout layout{{nodes * ranks_per_node, ranks_per_node}, kRows.back(), 7, kMaxChannels};
    size_t next = 0;
    const auto expect_next = [&](uint32_t first_section, uint32_t end_section) {
      for (uint32_t channel = 0; channel < kMaxChannels; ++channel) {
        for (uint32_t s = first_section; s < end_section; ++s) {
          const Section section = static_cast<Section>(s);
          EXPECT_EQ(layout.section_offset(channel, section), next);
          EXPECT_EQ(next % kSectionAlignment, 0u);
          next += (layout.section_bytes(section) + 4095) / 4096 * 4096;
        }
      }
    };
    expect_next(0, kSignalSections);  // of all channels, so that a device can have them elsewhere
    EXPECT_EQ(layout.signal_bytes(), next);
    expect_next(kSignalSections, kSections);
    EXPECT_EQ(layout.total_bytes(), next);
  }
}

TEST(Layout, HasOneBlockForItselfAndOneForEveryRankOfAnotherRail) {
  for (const auto& [nodes, ranks_per_node] : kShapes) {
    const Layout layout{{nodes * ranks_per_node, ranks_per_node}, kRows.front(), 1, 1};
    for (uint32_t own = 0; own < ranks_per_node; ++own) {
      std::set<size_t> blocks = {layout.block(own, 0, own)};
      for (uint32_t node = 0; node < nodes; ++node) {
        for (uint32_t index = 0; index < ranks_per_node; ++index) {
          if (index != own) blocks.insert(layout.block(own, node, index));
        }
      }
      EXPECT_EQ(blocks.size(), nodes * (ranks_per_node - 1) + 1);
      EXPECT_EQ(*blocks.rbegin() + 1, layout.blocks());
    }
  }
}

// DeepSeek-V3's shape on 64 ranks: 128 tokens, fp8 with one fp32 scale per 128 values, bf16 back, top-8.
TEST(Layout, StaysBelowFourTenthsOfAGibibyteForSixtyFourRanks) {
  constexpr Layout kLayout{{64, 8}, {8, 7168, 56 * 4, 2 * 7168}, 128, 1};
  static_assert(kLayout.total_bytes() * 10 <= 4 * (size_t{1} << 30));
  constexpr size_t kDispatchRow = 80 + 7168 + 224;  // 4 + 8 * 8 bytes of routing, padded to 80
  constexpr size_t kCombineRow = 14336;
  // Dispatch: staging for 8 nodes and slots of 7. Combine: results of 64 ranks, staging and slots of 7 nodes.
  constexpr size_t kPayload = 128 * ((8 + 7) * kDispatchRow + (64 + 7 + 7) * kCombineRow);
  EXPECT_GE(kLayout.total_bytes(), kPayload);
  EXPECT_LE(kLayout.total_bytes(), kPayload + 128 * 1024);  // words and padding
}

// ---- topology.h

TEST(Topology, NumbersRanksNodeByNodeAndMakesRailsOfEqualIndices) {
  for (const auto& [nodes, ranks_per_node] : kShapes) {
    const Topology topology{nodes * ranks_per_node, ranks_per_node};
    EXPECT_EQ(topology.nodes(), nodes);
    uint32_t rank = 0;
    for (uint32_t node = 0; node < nodes; ++node) {
      for (uint32_t index = 0; index < ranks_per_node; ++index, ++rank) {
        EXPECT_EQ(topology.rank_at(node, index), rank);
        EXPECT_EQ(topology.node_of(rank), node);
        EXPECT_EQ(topology.index_of(rank), index);
        for (uint32_t other = 0; other < nodes; ++other) {
          const uint32_t peer = topology.rail_peer(rank, other);
          EXPECT_EQ(topology.node_of(peer), other);
          EXPECT_EQ(topology.index_of(peer), index);
          EXPECT_EQ(topology.rail_peer(peer, node), rank);
        }
      }
    }
  }
}

TEST(Topology, GivesTheOtherNodesTheSlotsFromZeroWithoutGaps) {
  for (uint32_t nodes = 1; nodes <= kMaxNodes; ++nodes) {
    for (uint32_t self = 0; self < nodes; ++self) {
      uint32_t next = 0;
      for (uint32_t other = 0; other < nodes; ++other) {
        if (other != self) {
          EXPECT_EQ(Topology::slot_of(self, other), next++);
        }
      }
    }
  }
}

}  // namespace
}  // namespace efa_ep
