// How many bytes each half moves: counted by the engine, 16-byte access by access, and compared with the
// least that the half's part needs. Outputs are compared bit for bit elsewhere, so a total that is the least
// means that every byte is read once and written once. Prints the table of docs/performance.md, which
// tests/simt/bytes_table.py makes of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda_world.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

/// Bytes of a half, for one rank or for all.
struct Traffic {
  uint64_t read = 0, written = 0;
  bool operator==(const Traffic&) const = default;
};
std::ostream& operator<<(std::ostream& out, const Traffic& t) {
  return out << t.read << " read, " << t.written << " written";
}
/// By where the bytes lie: the caller's tensors, or a section of the own or a peer's arena.
using Places = std::map<std::string, Traffic>;
constexpr const char* kTensors = "tensors";

std::string place_name(Section section, bool own) {
  return std::string(own ? "own " : "peer ") + kSectionNames[static_cast<uint32_t>(section)];
}

/// Counts the accesses of all ranks of a world. One at a time.
class Counter {
 public:
  explicit Counter(World& world) : world_(world), counts_(world.config().world()) {
    counter_ = this;
    simt::observe_vectors([](const void* p, bool write) { counter_->count(p, write); });
  }
  ~Counter() { simt::observe_vectors(nullptr); }
  Counter(const Counter&) = delete;
  Counter& operator=(const Counter&) = delete;

  /// Of a rank since the last call. While no kernel runs.
  Places take(uint32_t rank) {
    Places places;
    for (size_t place = 0; place < kPlaces; ++place) {
      const Traffic traffic{counts_[rank][place][0].exchange(0), counts_[rank][place][1].exchange(0)};
      if (traffic == Traffic{}) continue;
      places[place == 0 ? kTensors : place_name(static_cast<Section>((place - 1) / 2), place % 2 == 1)] =
          traffic;
    }
    return places;
  }

 private:
  static constexpr size_t kPlaces = 1 + 2 * kSections;

  void count(const void* p, bool write) {
    const auto device = static_cast<uint32_t>(simt::cur().device);
    counts_[device][place_of(device, static_cast<const std::byte*>(p))][write ? 1 : 0] += 16;
  }
  size_t place_of(uint32_t device, const std::byte* p) {
    const Layout& layout = world_.config().layout;
    const Topology& topology = layout.topology;
    for (uint32_t index = 0; index < topology.ranks_per_node; ++index) {
      const uint32_t owner = topology.rank_at(topology.node_of(device), index);
      const std::byte* arena = world_.arena(owner);
      if (p < arena || p >= arena + layout.total_bytes()) continue;
      uint32_t section = kSections - 1;
      while (static_cast<size_t>(p - arena) < layout.section_offset(0, static_cast<Section>(section)))
        --section;
      return 1 + 2 * section + (owner == device ? 0 : 1);
    }
    return 0;
  }

  inline static Counter* counter_ = nullptr;
  World& world_;
  std::vector<std::array<std::array<std::atomic<uint64_t>, 2>, kPlaces>> counts_;
};

/// The least that each rank has to move in a round, from the routing alone: [half][rank].
class Minimum {
 public:
  Minimum(const WorldConfig& config, const std::vector<RankRound>& round)
      : config_(config), topology_(config.layout.topology), halves_(4, std::vector<Places>(config.world())) {
    for (uint32_t source = 0; source < config.world(); ++source) {
      for (uint32_t token = 0; token < round[source].tokens; ++token) {
        slots_of_.clear();
        experts_.clear();
        for (uint32_t slot = 0; slot < config.layout.row.top_k; ++slot) {
          const int64_t id = round[source].ids[token * config.layout.row.top_k + slot];
          if (id < 0) continue;
          ++slots_of_[config.expert_owner[static_cast<size_t>(id)]];
          experts_.insert(id);
        }
        add_token(source);
      }
    }
    for (auto& half : halves_) {
      for (Places& places : half)
        std::erase_if(places, [](const auto& place) { return place.second == Traffic{}; });
    }
  }
  const Places& at(Half half, uint32_t rank) const { return halves_[static_cast<size_t>(half)][rank]; }

 private:
  uint32_t node_of(uint32_t rank) const { return topology_.node_of(rank); }
  Traffic& at(Half half, uint32_t rank, const std::string& place) {
    return halves_[static_cast<size_t>(half)][rank][place];
  }
  Traffic& arena(Half half, uint32_t rank, uint32_t holder, Section section) {
    return at(half, rank, place_name(section, rank == holder));
  }

  void add_token(uint32_t source) {
    const RowShape& row = config_.layout.row;
    std::set<uint32_t> nodes;
    for (const auto& [owner, slots] : slots_of_) nodes.insert(node_of(owner));
    const bool stays = nodes.contains(node_of(source));
    const auto remote = static_cast<uint32_t>(nodes.size() - (stays ? 1 : 0));

    // A row per other node; or one that the own node reads, of which the payload may be there already.
    const uint64_t rows = remote > 0 ? remote : stays ? 1 : 0;
    const bool there = config_.in_place && remote == 0;
    Traffic& staged = arena(Half::kDispatchSend, source, source, Section::kDispatchStaging);
    staged.written += rows * (row.payload_offset() + (there ? 0 : row.payload_bytes));
    if (rows > 0 && !there) {
      (config_.in_place ? staged : at(Half::kDispatchSend, source, kTensors)).read += row.payload_bytes;
    }
    for (const auto& [owner, slots] : slots_of_) add_owner(source, owner, slots);
    add_sums(source, nodes);
    at(Half::kCombineRecv, source, kTensors).written += row.combine_bytes;
  }

  /// What an owner does with a token: it reads the row where it lies, and reduces its results to one.
  void add_owner(uint32_t source, uint32_t owner, uint32_t slots) {
    const RowShape& row = config_.layout.row;
    const bool own_node = node_of(source) == node_of(owner);
    const uint32_t holder = own_node ? source : topology_.rank_at(node_of(owner), topology_.index_of(source));
    arena(Half::kDispatchRecv, owner, holder, own_node ? Section::kDispatchStaging : Section::kDispatchSlots)
        .read += row.payload_bytes;
    // A token that names an expert twice gets one row there.
    const auto own_experts =
        static_cast<uint64_t>(std::count_if(experts_.begin(), experts_.end(), [&](int64_t id) {
          return config_.expert_owner[static_cast<size_t>(id)] == owner;
        }));
    at(Half::kDispatchRecv, owner, kTensors).written +=
        row.payload_bytes * (config_.per_expert ? own_experts : 1);
    if (config_.in_place && !config_.per_expert && !config_.per_slot)
      return;  // the result is where it belongs
    at(Half::kCombineSend, owner, kTensors).read +=
        row.combine_bytes * (config_.per_expert || config_.per_slot ? slots : 1);
    arena(Half::kCombineSend, owner, owner, Section::kResults).written += row.combine_bytes;
  }

  /// Results are read once, by the rail of their node if they go to another one; sums of nodes as well.
  void add_sums(uint32_t source, const std::set<uint32_t>& nodes) {
    const uint64_t bytes = config_.layout.row.combine_bytes;
    const bool sums = topology_.ranks_per_node > 1;
    for (const uint32_t node : nodes) {
      const bool own_node = node == node_of(source);
      const uint32_t reader = topology_.rank_at(node, topology_.index_of(source));
      for (const auto& [owner, slots] : slots_of_) {
        if (node_of(owner) != node || (!own_node && !sums)) continue;
        arena(Half::kCombineRecv, reader, owner, Section::kResults).read += bytes;
      }
      if (own_node) continue;
      if (sums) arena(Half::kCombineRecv, reader, reader, Section::kCombineStaging).written += bytes;
      arena(Half::kCombineRecv, source, source, Section::kCombineSlots).read += bytes;
    }
  }

  const WorldConfig& config_;
  const Topology topology_;
  // Of the token: slots by owner, and experts
  std::map<uint32_t, uint32_t> slots_of_;
  std::set<int64_t> experts_;
  std::vector<std::vector<Places>> halves_;
};

WorldConfig world_of(uint32_t nodes, uint32_t ranks, uint32_t experts, const RowShape& row, uint32_t tokens) {
  WorldConfig config;
  config.layout.topology = {nodes * ranks, ranks};
  config.layout.row = row;
  config.layout.max_tokens = tokens;
  for (uint32_t expert = 0; expert < experts; ++expert) {
    config.expert_owner.push_back(expert / (experts / config.world()));
  }
  config.routing = Routing::kUniform;
  config.chunk_bytes = 64 * 1024;
  config.proxy_threads = false;
  config.seed = test_seed(17);
  return config;
}

/// By half, of all ranks together.
struct Totals {
  std::array<Places, 4> counted, least;
};

void add(Places& sum, const Places& places) {
  for (const auto& [place, traffic] : places) {
    sum[place].read += traffic.read;
    sum[place].written += traffic.written;
  }
}

/// Runs one round, half by half, and compares each rank's counts with the least.
Totals run_counted(const WorldConfig& config) {
  CudaWorld world(config, {});
  const std::vector<RankRound> round = Planner(config).plan();
  const Minimum minimum(config, round);
  Counter counter(world.world());
  Totals totals;
  for (size_t half = 0; half < 4; ++half) {
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      world.rank(rank).queue(static_cast<Half>(half), 0, round[rank]);
    }
    for (uint32_t rank = 0; rank < config.world(); ++rank) world.rank(rank).sync();
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      const Places places = counter.take(rank);
      const Places& least = minimum.at(static_cast<Half>(half), rank);
      EXPECT_EQ(places, least) << kHalfNames[half] << " of rank " << rank;
      add(totals.counted[half], places);
      add(totals.least[half], least);
    }
  }
  for (uint32_t rank = 0; rank < config.world(); ++rank) world.rank(rank).check();
  return totals;
}

TEST(Bytes, AreReadAndWrittenOnce) {
  const RowShape row{.top_k = 4, .payload_bytes = 2064, .scale_bytes = 0, .combine_bytes = 1040};
  for (const auto& [nodes, ranks] :
       {std::pair{1u, 1u}, std::pair{1u, 3u}, std::pair{3u, 1u}, std::pair{2u, 2u}}) {
    for (const bool in_place : {false, true}) {
      for (const bool per_expert : {false, true}) {
        for (const bool per_slot : {false, true}) {
          if (per_expert && per_slot) continue;
          WorldConfig config = world_of(nodes, ranks, 4 * nodes * ranks, row, 20);
          config.in_place = in_place;
          config.per_expert = per_expert;
          config.per_slot = per_slot;
          config.weights_applied = !per_expert && !per_slot;
          config.routing = in_place ? Routing::kSparse : Routing::kRepeated;
          const testing::ScopedTrace where(__FILE__, __LINE__, testing::Message() << config);
          run_counted(config);
        }
      }
    }
  }
}

// DeepSeek-V3 on two nodes of eight GPUs. Payloads only: headers, ids, weights and lists are not in the
// table.
TEST(Bytes, OfDeepSeekV3) {
  constexpr uint32_t kHidden = 7168;
  const RowShape row{
      .top_k = 8, .payload_bytes = 2 * kHidden, .scale_bytes = 0, .combine_bytes = 2 * kHidden};
  const WorldConfig config = world_of(2, 8, 256, row, kSanitized ? 2 : 16);
  uint64_t tokens = 0;
  for (const RankRound& rank : Planner(config).plan()) tokens += rank.tokens;
  const Totals totals = run_counted(config);
  const auto per_token = [tokens](uint64_t bytes) {
    return static_cast<double>(bytes) / static_cast<double>(tokens);
  };
  for (size_t half = 0; half < 4; ++half) {
    for (const auto& [place, counted] : totals.counted[half]) {
      const Traffic least = totals.least[half].contains(place) ? totals.least[half].at(place) : Traffic{};
      std::printf("bytes per token: %s, %s, %.0f, %.0f, %.0f, %.0f\n", kHalfNames[half], place.c_str(),
                  per_token(counted.read), per_token(counted.written), per_token(least.read),
                  per_token(least.written));
    }
  }
}

}  // namespace
}  // namespace efa_ep
