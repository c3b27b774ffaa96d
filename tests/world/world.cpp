#include "world.h"

#include <algorithm>
#include <utility>

namespace efa_ep {

World::World(const WorldConfig& config, std::chrono::nanoseconds timeout)
    : config_(config),
      trace_(__FILE__, __LINE__, testing::Message() << config_),
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

World::~World() = default;

void World::dispatch_send(uint32_t rank, uint32_t channel, const RankRound& round) {
  const size_t row = config_.layout.row.payload_bytes;
  Bytes x = round.x;
  Bytes scales = round.scales;
  std::vector<int64_t> wide_ids = round.ids;
  std::vector<int32_t> narrow_ids(round.ids.begin(), round.ids.end());
  std::vector<float> weights = round.weights;
  DispatchInput input{.x = x.data(),
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

void World::dispatch_recv(uint32_t rank, uint32_t channel, const RankRound& round) {
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

void World::combine_send(uint32_t rank, uint32_t channel, const RankRound& round) {
  Bytes rows = round.expert_rows;
  const bool in_place = config_.in_place && !config_.per_expert && !config_.per_slot;
  if (in_place) std::copy(rows.begin(), rows.end(), device(rank).results(channel));
  device(rank).combine_send(channel, {.rows = in_place ? device(rank).results(channel) : rows.data(),
                                      .per_slot = config_.per_slot,
                                      .weights_applied = config_.weights_applied});
  std::fill(rows.begin(), rows.end(), kUntouched);
}

void World::combine_recv(uint32_t rank, uint32_t channel, const RankRound& round) {
  EXPECT_EQ(device(rank).tokens(channel), round.tokens);
  Bytes out(round.out.size(), kUntouched);
  device(rank).combine_recv(channel, out.data());
  expect_rows("out", out, round.out, config_.layout.row.combine_bytes);
}

void World::run(Half half, uint32_t rank, uint32_t channel, const RankRound& round) {
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

}  // namespace efa_ep
