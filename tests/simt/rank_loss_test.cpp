// Losing a rank and taking it back, without a new capture: the round of each rank is captured into a graph
// once, and its launches are replayed, with the arguments they had then, in worlds with other arenas, other
// proxies and other owners. A lost position is served by kernels of a live rank.
//
// The oracle is the Planner's, of the round in which lost ranks have no tokens and lost experts are -1. Rank
// 1 keeps its CPU halves: with the same mask, both kinds agree.
#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "cuda/stand_in.h"
#include "cuda_rank.h"
#include "cuda_world.h"
#include "errors.h"
#include "small_world.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

constexpr uint32_t kWorld = 4;
constexpr uint32_t kCpuRank = 1;
constexpr uint32_t kLost = 2;
constexpr uint32_t kServer = 3;  // of the lost one's position: they share a node
constexpr uint32_t kRing = 64;
constexpr uint32_t kKernels = 8;  // of a round with several nodes of several ranks

/// A rank on a GPU. Its pinned memory, workspace, inputs and outputs stay where they are in all generations.
class GraphRank {
 public:
  GraphRank(const WorldConfig& config, uint32_t rank)
      : config_(config),
        rank_(rank),
        host_(cuda::HostBlock::bytes(kRing, config.layout)),
        stream_(simt::stream_create(static_cast<int>(rank))) {
    const Layout& layout = config.layout;
    const size_t tokens = layout.max_tokens;
    const size_t rows = config.world() * tokens;
    x_.resize(tokens * layout.row.payload_bytes);
    ids_.resize(tokens * layout.row.top_k);
    weights_.resize(ids_.size());
    received_x_.resize(rows * layout.row.payload_bytes);
    received_ids_.resize(rows * layout.row.top_k);
    received_weights_.resize(received_ids_.size());
    tokens_per_expert_.resize(config.experts());
    expert_rows_.resize(rows * layout.row.combine_bytes);
    out_.resize(tokens * layout.row.combine_bytes);
  }

  /// Becomes a member of a generation: fills the same memory anew.
  void enter(World& generation) {
    const Topology& topology = config_.layout.topology;
    proxy_ = generation.proxy(rank_);
    cuda::CudaDeviceOptions options;
    options.config = {.layout = config_.layout,
                      .rank = rank_,
                      .expert_owner = generation.config().expert_owner,
                      .chunk_bytes = proxy_->chunk_bytes(),
                      .rails = proxy_->rails(),
                      .timeout_ns = 60'000'000'000};
    options.num_sms = kSanitized ? 1 : 2;
    options.host = options.host_on_device = host_.data();
    options.ring_capacity = kRing;
    for (uint32_t index = 0; index < topology.ranks_per_node; ++index) {
      options.arenas.push_back(generation.arena(topology.rank_at(topology.node_of(rank_), index)));
    }
    options.signals_in_arena = true;
    device_ = std::make_unique<cuda::CudaDevice>(options, proxy_);
    if (!workspace_) workspace_.emplace(device_->workspace_bytes());
    std::fill_n(host_.data(), host_.bytes(), std::byte{0});
    std::fill_n(workspace_->data(), workspace_->bytes(), std::byte{0});
    const std::vector<std::byte> image = device_->use_workspace(workspace_->data());
    std::copy(image.begin(), image.end(), workspace_->data());
    reader_.emplace(reinterpret_cast<cuda::RingEntry*>(host_.data() + cuda::HostBlock::ring_offset()),
                    &host().ring_tail, &host().stop, kRing);
  }

  void capture() {
    const auto stream = reinterpret_cast<cuda::Stream>(stream_);
    simt::capture_begin(stream_);
    device_->dispatch_send(0, stream,
                           {.x = x_.data(),
                            .x_stride = config_.layout.row.payload_bytes,
                            .ids = ids_.data(),
                            .ids_are_64_bit = true,
                            .weights = weights_.data(),
                            .tokens = config_.layout.max_tokens,
                            .tokens_on_device = &tokens_});
    device_->dispatch_recv(0, stream,
                           {.x = received_x_.data(),
                            .ids = received_ids_.data(),
                            .weights = received_weights_.data(),
                            .tokens_per_expert = tokens_per_expert_.data()});
    device_->combine_send(0, stream, {.rows = expert_rows_.data()});
    device_->combine_recv(0, stream, out_.data());
    graph_ = simt::capture_end(stream_);
  }
  size_t captured() const { return simt::graph_size(*graph_); }

  /// Runs the graph on a round's inputs.
  void replay(const RankRound& round) {
    tokens_ = static_cast<int32_t>(round.tokens);
    std::copy(round.x.begin(), round.x.end(), x_.begin());
    std::copy(round.ids.begin(), round.ids.end(), ids_.begin());
    std::copy(round.weights.begin(), round.weights.end(), weights_.begin());
    std::copy(round.expert_rows.begin(), round.expert_rows.end(), expert_rows_.begin());
    simt::graph_launch(*graph_, stream_);
  }
  /// Throws what a kernel failed with.
  void wait() { device_->wait(reinterpret_cast<cuda::Stream>(stream_)); }
  void check(const RankRound& want) const {
    const auto starts_with = [](const auto& got, const auto& begin) {
      return std::equal(begin.begin(), begin.end(), got.begin());
    };
    EXPECT_EQ(host().rows[0], static_cast<int32_t>(want.rows));
    EXPECT_TRUE(starts_with(received_x_, want.received_x));
    EXPECT_TRUE(starts_with(received_ids_, want.received_ids));
    EXPECT_TRUE(starts_with(received_weights_, want.received_weights));
    EXPECT_TRUE(starts_with(tokens_per_expert_, want.tokens_per_expert));
    EXPECT_TRUE(starts_with(out_, want.out));
  }

  /// Has no say in when kernels end.
  void stop() { std::atomic_ref(host().stop).store(1, std::memory_order_relaxed); }
  bool pump() { return efa_ep::pump(*reader_, *proxy_); }
  cuda::CudaDevice& device() { return *device_; }
  cuda::HostBlock& host() const { return *reinterpret_cast<cuda::HostBlock*>(host_.data()); }

 private:
  const WorldConfig& config_;
  const uint32_t rank_;
  const TestMemory host_;
  std::optional<TestMemory> workspace_;
  const simt::stream_t stream_;
  Proxy* proxy_ = nullptr;
  std::unique_ptr<cuda::CudaDevice> device_;
  std::optional<cuda::DeviceRingReader> reader_;
  std::shared_ptr<simt::Graph> graph_;
  int32_t tokens_ = 0;
  Bytes x_, received_x_, expert_rows_, out_;
  std::vector<int64_t> ids_;
  std::vector<int32_t> received_ids_, tokens_per_expert_;
  std::vector<float> weights_, received_weights_;
};

WorldConfig config_of(uint64_t seed) {
  WorldConfig config;
  config.layout.topology = {kWorld, 2};
  config.layout.row = {.top_k = 3, .payload_bytes = 48, .scale_bytes = 0, .combine_bytes = 32};
  config.layout.max_tokens = 9;
  for (uint32_t expert = 0; expert < 2 * kWorld; ++expert) config.expert_owner.push_back(expert % kWorld);
  config.ids_are_64_bit = true;
  config.routing = Routing::kUniform;
  config.chunk_bytes = 200;
  config.proxy_threads = true;  // of the CPU's rank
  config.seed = seed;
  return config;
}

class RankLoss : public testing::Test {
 protected:
  RankLoss() {
    for (const uint32_t rank : {0u, kLost, kServer}) {
      ranks_[rank] = std::make_unique<GraphRank>(whole_, rank);
    }
  }
  ~RankLoss() override { leave(); }

  /// All that live build a generation: new arenas, endpoints, proxies, owners.
  void enter(const std::set<uint32_t>& lost) {
    leave();
    lost_ = lost;
    WorldConfig config = whole_;
    for (uint32_t& owner : config.expert_owner) {
      if (lost.contains(owner)) owner = kNoOwner;
    }
    world_ = std::make_unique<World>(config);
    for (const auto& rank : ranks_) {
      if (rank != nullptr) rank->enter(*world_);
    }
    if (lost.contains(kLost)) {
      stand_in_ = std::make_unique<cuda::StandIn>(ranks_[kLost]->device(), ranks_[kServer]->host(), kLost);
    }
    network_stops_.store(false);
    network_ = std::thread([this] {
      while (!network_stops_.load(std::memory_order_relaxed)) {
        bool moved = false;
        for (const auto& rank : ranks_) moved |= rank != nullptr && rank->pump();
        if (!moved) std::this_thread::yield();
      }
    });
  }

  /// Ends a generation, whatever it was doing.
  void leave() {
    if (world_ == nullptr) return;
    for (const auto& rank : ranks_) {
      if (rank != nullptr) rank->stop();
    }
    stand_in_.reset();
    network_stops_.store(true);
    network_.join();
    world_.reset();
  }

  bool is_lost(uint32_t rank) const { return lost_.contains(rank); }

  /// A round of the generation: what the ranks send, and what has to come of it.
  std::vector<RankRound> plan() {
    std::vector<std::vector<int64_t>> sent(kWorld);
    std::vector<RankRound> round = planner_.plan([&](uint32_t rank, RankRound& plan) {
      if (is_lost(rank)) plan = {};
      sent[rank] = plan.ids;
      for (size_t entry = 0; entry < plan.ids.size(); ++entry) {
        if (!is_lost(whole_.expert_owner[static_cast<size_t>(plan.ids[entry])])) continue;
        plan.ids[entry] = -1;
        ++dropped_slots_[rank];
        dropped_weight_[rank] += plan.weights[entry];
      }
    });
    for (uint32_t rank = 0; rank < kWorld; ++rank) round[rank].ids = sent[rank];
    return round;
  }

  void play(uint32_t rounds) {
    dropped_slots_.fill(0);
    dropped_weight_.fill(0);
    for (uint32_t number = 0; number < rounds && !HasFailure(); ++number) {
      const std::vector<RankRound> round = plan();
      std::thread on_cpu([&] {
        for (uint32_t half = 0; half < 4; ++half) {
          run_half(*world_, static_cast<Half>(half), {kCpuRank}, round);
        }
      });
      each_live([&](uint32_t rank) { ranks_[rank]->replay(round[rank]); });
      each_live([&](uint32_t rank) { ranks_[rank]->wait(); });
      on_cpu.join();
      each_live([&](uint32_t rank) { ranks_[rank]->check(round[rank]); });
    }
    each_live([&](uint32_t rank) {  // counted by the kernels: the host has launched graphs and nothing else
      const cuda::ChannelTotals totals = ranks_[rank]->device().totals();
      EXPECT_EQ(totals.rounds, rounds);
      EXPECT_EQ(totals.dropped_slots, dropped_slots_[rank]);
      EXPECT_EQ(static_cast<double>(static_cast<int64_t>(totals.dropped_weight)) /
                    cuda::ChannelTotals::kWeightUnits,
                dropped_weight_[rank]);
    });
  }

  void each_live(const std::function<void(uint32_t)>& work) const {
    for (uint32_t rank = 0; rank < kWorld; ++rank) {
      const testing::ScopedTrace where(__FILE__, __LINE__, testing::Message() << "rank " << rank);
      if (ranks_[rank] != nullptr && !is_lost(rank)) work(rank);
    }
  }
  uint64_t dropped_slots() const { return dropped_slots_[0] + dropped_slots_[kServer]; }

  const WorldConfig whole_ = config_of(test_seed(61));
  const testing::ScopedTrace trace_{__FILE__, __LINE__, testing::Message() << whole_};
  Planner planner_{whole_};
  std::set<uint32_t> lost_;
  std::array<uint64_t, kWorld> dropped_slots_{};
  std::array<double, kWorld> dropped_weight_{};
  std::array<std::unique_ptr<GraphRank>, kWorld> ranks_;  // null: on the CPU
  std::unique_ptr<World> world_;
  std::unique_ptr<cuda::StandIn> stand_in_;
  std::atomic<bool> network_stops_{false};
  std::thread network_;
};

TEST_F(RankLoss, CapturedRoundsGoOnWithoutARankAndWithItAgain) {
  const uint32_t rounds = amount(kSanitized ? 2 : 5, 50);
  enter({});
  each_live([&](uint32_t rank) {
    ranks_[rank]->capture();
    EXPECT_EQ(ranks_[rank]->captured(), kKernels);
  });
  play(rounds);
  EXPECT_EQ(dropped_slots(), 0u);

  // The rank is gone in the middle of a round: the others' kernels wait until somebody ends that.
  const std::vector<RankRound> broken = plan();
  for (const uint32_t rank : {0u, kServer}) ranks_[rank]->replay(broken[rank]);
  for (const uint32_t rank : {0u, kServer}) ranks_[rank]->stop();
  for (const uint32_t rank : {0u, kServer}) EXPECT_THROW(ranks_[rank]->wait(), RankTimeoutError);

  enter({kLost});
  play(rounds);
  EXPECT_GT(dropped_slots(), 0u);
  EXPECT_TRUE(stand_in_->wait_until_idle(kPatience));
  EXPECT_EQ(ranks_[kLost]->device().totals().rounds, rounds);

  enter({});
  play(rounds);
  EXPECT_EQ(dropped_slots(), 0u);
}

TEST(WeightUnits, AreWhatAFloatIsWorth) {
  for (const float weight :
       {0.0f, 1.0f, -1.0f, 0.7f, 2.5f, 1e-5f, 0x1p-24f, 0x1.8p-24f, 0x1p-25f, 1e-30f, 4e9f}) {
    const double exact = static_cast<double>(weight) * cuda::ChannelTotals::kWeightUnits;
    EXPECT_EQ(cuda::ChannelTotals::weight_units(std::bit_cast<uint32_t>(weight)), static_cast<int64_t>(exact))
        << weight;
  }
}

TEST_F(RankLoss, AStandInHandsItsErrorToTheRankThatServesIt) {
  enter({kLost});
  ranks_[kLost]->stop();
  std::atomic_ref(ranks_[kServer]->host().totals[0].rounds).store(1, std::memory_order_relaxed);
  const Patience patience;
  try {
    while (true) {
      patience.check();
      stand_in_->throw_if_failed();
    }
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.half, "dispatch_recv");
    EXPECT_EQ(error.round, 1u);
  }
  EXPECT_THROW(stand_in_->wait_until_idle(kPatience), RankTimeoutError);
}

}  // namespace
}  // namespace efa_ep
