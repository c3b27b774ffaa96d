// A world of CPU devices in one process: ranks are threads, arenas plain memory, the network a loopback.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/device.h"
#include "loopback_network.h"
#include "test_environment.h"
#include "world_plan.h"

namespace efa_ep {

class World {
 public:
  explicit World(const WorldConfig& config, std::chrono::nanoseconds timeout = kPatience)
      : config_(config),
        network_({.ranks = config.world(),
                  .rails = config.rails,
                  .send_queue_depth = config.send_queue_depth,
                  .completion_queue_depth = config.send_queue_depth + config.arrival_room,
                  .seed = config.seed,
                  .honours_fence = config.signal_policy == SignalPolicyKind::kNicOrdered}) {
    const Topology& topology = config.layout.topology;
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      arenas_.emplace_back(config.layout.total_bytes());
      network_.endpoint(rank).register_memory(arenas_[rank].data(), arenas_[rank].bytes());
    }
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      for (uint32_t node = 0; node < topology.nodes(); ++node) {
        const uint32_t peer = topology.rail_peer(rank, node);
        if (peer != rank) network_.endpoint(rank).connect(peer, network_.endpoint(peer).address());
      }
    }
    for (uint32_t rank = 0; rank < config.world(); ++rank) {
      policies_.push_back(SignalPolicy::create(config.signal_policy, network_.endpoint(rank)));
      proxies_.push_back(topology.nodes() == 1
                             ? nullptr
                             : std::make_unique<Proxy>(*policies_[rank], arenas_[rank].data(),
                                                       ProxyOptions{.layout = config.layout,
                                                                    .rank = rank,
                                                                    .chunk_bytes = config.chunk_bytes,
                                                                    .ring_commands = config.ring_commands,
                                                                    .timeout = timeout},
                                                       config.proxy_threads));
      std::vector<std::byte*> node_arenas;
      for (uint32_t index = 0; index < topology.ranks_per_node; ++index) {
        node_arenas.push_back(arenas_[topology.rank_at(topology.node_of(rank), index)].data());
      }
      CpuDeviceOptions options;
      options.layout = config.layout;
      options.rank = rank;
      options.expert_owner = config.expert_owner;
      options.combine_type = config.combine_type;
      options.per_expert = config.per_expert;
      options.timeout = timeout;
      options.cached_bytes = config.cached_bytes;
      devices_.push_back(std::make_unique<CpuDevice>(options, node_arenas, proxies_[rank].get()));
    }
  }

  const WorldConfig& config() const { return config_; }
  LoopbackNetwork& network() { return network_; }
  CpuDevice& device(uint32_t rank) { return *devices_.at(rank); }
  Proxy* proxy(uint32_t rank) { return proxies_.at(rank).get(); }
  std::byte* arena(uint32_t rank) { return arenas_.at(rank).data(); }

  // The four halves of one rank, with checked results. Inputs lie in memory that is overwritten and freed as
  // soon as a half has returned, or where the device wants them; outputs lie in memory of exactly their size.

  void dispatch_send(uint32_t rank, uint32_t channel, const RankRound& round) {
    const size_t row = config_.layout.row.payload_bytes;
    Bytes x = round.x;
    Bytes scales = round.scales;
    std::vector<int64_t> wide_ids = round.ids;
    std::vector<int32_t> narrow_ids(round.ids.begin(), round.ids.end());
    std::vector<float> weights = round.weights;
    DispatchInput input{
        .x = x.data(),
        .x_stride = row,
        .scales = scales.data(),
        .ids = config_.ids_are_64_bit ? static_cast<void*>(wide_ids.data()) : narrow_ids.data(),
        .ids_are_64_bit = config_.ids_are_64_bit,
        .weights = weights.data(),
        .tokens = round.tokens};
    if (config_.in_place) {
      input.x = device(rank).activations(channel);
      input.x_stride = config_.layout.dispatch_row();
      for (uint32_t token = 0; token < round.tokens; ++token) {
        std::copy_n(x.data() + token * row, row, device(rank).activations(channel) + token * input.x_stride);
      }
    }
    device(rank).dispatch_send(channel, input);
    std::fill(x.begin(), x.end(), kUntouched);
    std::fill(scales.begin(), scales.end(), kUntouched);
    std::fill(wide_ids.begin(), wide_ids.end(), -7);
    std::fill(narrow_ids.begin(), narrow_ids.end(), -7);
    std::fill(weights.begin(), weights.end(), -7.0f);
  }

  void dispatch_recv(uint32_t rank, uint32_t channel, const RankRound& round) {
    ASSERT_EQ(device(rank).dispatch_wait(channel), round.rows);
    Bytes x(round.received_x.size(), kUntouched);
    Bytes scales(round.received_scales.size(), kUntouched);
    std::vector<int32_t> ids(round.received_ids.size(), -7);
    std::vector<float> weights(round.received_weights.size(), -7.0f);
    std::vector<int32_t> tokens_per_expert(round.tokens_per_expert.size(), -7);
    device(rank).dispatch_pack(channel, {.x = x.data(),
                                         .scales = scales.data(),
                                         .ids = ids.data(),
                                         .weights = weights.data(),
                                         .tokens_per_expert = tokens_per_expert.data()});
    EXPECT_EQ(tokens_per_expert, round.tokens_per_expert);
    EXPECT_EQ(ids, round.received_ids);
    EXPECT_EQ(weights, round.received_weights);
    expect_rows("x", x, round.received_x, config_.layout.row.payload_bytes);
    expect_rows("scales", scales, round.received_scales, config_.layout.row.scale_bytes);
  }

  void combine_send(uint32_t rank, uint32_t channel, const RankRound& round) {
    Bytes rows = round.expert_rows;
    const bool in_place = config_.in_place && !config_.per_expert && !config_.per_slot;
    if (in_place) std::copy(rows.begin(), rows.end(), device(rank).results(channel));
    device(rank).combine_send(channel, {.rows = in_place ? device(rank).results(channel) : rows.data(),
                                        .per_slot = config_.per_slot,
                                        .weights_applied = config_.weights_applied});
    std::fill(rows.begin(), rows.end(), kUntouched);
  }

  void combine_recv(uint32_t rank, uint32_t channel, const RankRound& round) {
    EXPECT_EQ(device(rank).tokens(channel), round.tokens);
    Bytes out(round.out.size(), kUntouched);
    device(rank).combine_recv(channel, out.data());
    expect_rows("out", out, round.out, config_.layout.row.combine_bytes);
  }

  void run(Half half, uint32_t rank, uint32_t channel, const RankRound& round) {
    switch (half) {
      case Half::kDispatchSend:
        return dispatch_send(rank, channel, round);
      case Half::kDispatchRecv:
        return dispatch_recv(rank, channel, round);
      case Half::kCombineSend:
        return combine_send(rank, channel, round);
      case Half::kCombineRecv:
        return combine_recv(rank, channel, round);
    }
  }

 private:
  static void expect_rows(const std::string& name, const Bytes& got, const Bytes& want, size_t row_bytes) {
    ASSERT_EQ(got.size(), want.size());
    const auto [first, other] = std::mismatch(got.begin(), got.end(), want.begin());
    if (first == got.end()) return;
    const auto at = static_cast<size_t>(first - got.begin());
    ADD_FAILURE() << name << ": row " << at / row_bytes << " of " << got.size() / row_bytes
                  << " differs first at byte " << at % row_bytes << " of " << row_bytes << ": "
                  << static_cast<int>(*first) << " instead of " << static_cast<int>(*other);
  }

  const WorldConfig config_;
  const testing::ScopedTrace trace_{__FILE__, __LINE__, testing::Message() << config_};
  LoopbackNetwork network_;
  std::vector<TestMemory> arenas_;
  std::vector<std::unique_ptr<SignalPolicy>> policies_;
  std::vector<std::unique_ptr<Proxy>> proxies_;
  std::vector<std::unique_ptr<CpuDevice>> devices_;
};

}  // namespace efa_ep
