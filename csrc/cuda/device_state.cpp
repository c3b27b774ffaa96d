#include "cuda/device_state.h"

#include <cstring>
#include <string>

#include "errors.h"
#include "protocol/chunking.h"
#include "protocol/placement.h"

namespace efa_ep::cuda {
namespace {

constexpr size_t kPartAlignment = 256;

/// Takes consecutive parts of the workspace.
class Parts {
 public:
  explicit Parts(std::byte* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(size_t count) {
    const size_t offset = used_;
    used_ = align_up(used_ + count * sizeof(T), kPartAlignment);
    return reinterpret_cast<T*>(base_ + offset);
  }
  size_t used() const { return used_; }

 private:
  const uintptr_t base_;
  size_t used_ = 0;
};

uint32_t most_chunks(const DeviceConfig& config, Operation operation) {
  return Chunking::of(config.layout.max_tokens, config.layout.row_bytes(operation), config.chunk_bytes,
                      config.rails)
      .chunks;
}

void place_channel(const DeviceConfig& config, const DeviceMemory& memory, Parts& parts,
                   uint32_t channel_index, DeviceState& state) {
  const Layout& layout = config.layout;
  const size_t others = state.nodes - 1;
  ChannelState& channel = state.channels[channel_index];
  for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
    const auto op = static_cast<size_t>(operation);
    channel.arrivals[op] = layout.arrival(channel_index, operation, 0);
    channel.completions[op] = layout.completion(channel_index, operation);
    channel.outgoing[op] = layout.outgoing(channel_index, operation);
    channel.slots[op] = layout.section_offset(
        channel_index, operation == Operation::kDispatch ? Section::kDispatchSlots : Section::kCombineSlots);
    channel.staged[op] = parts.take<uint32_t>(others * state.max_chunks[op]);
  }
  channel.dispatch_flags = layout.dispatch_flag(channel_index, 0);
  channel.result_flags = layout.result_flag(channel_index, 0);
  channel.row_lists = layout.row_list(channel_index, 0, 0);
  channel.results = layout.results(channel_index);
  channel.counters = parts.take<ChannelCounters>(1);
  if (memory.totals != nullptr) channel.totals = memory.totals + channel_index;
  if (memory.times != nullptr) channel.times = memory.times + channel_index;
  channel.sent = parts.take<Tile>(size_t{state.destinations()} * state.token_tiles);
  channel.sent_rows = parts.take<uint32_t>(state.destinations());
  channel.forwarded = parts.take<Tile>(others * state.ranks_per_node() * state.token_tiles);
  channel.slot_rows = parts.take<uint32_t>(others);
  channel.forwarded_rows = parts.take<uint32_t>(others * state.ranks_per_node());
  channel.first_row = parts.take<uint32_t>(state.world() + 1);
  channel.received = parts.take<const std::byte*>(state.capacity());
  if (config.per_expert) {
    channel.of_expert = parts.take<Tile>(size_t{state.local_experts} * state.row_tiles);
  }
}

/// The state, and where its tables go.
struct Plan {
  DeviceState state;
  size_t image_bytes = 0;  // the state and the tables that the host writes
  size_t bytes = 0;
};

Plan plan(const DeviceConfig& config, const Placement& placement, const DeviceMemory& memory) {
  const Topology& topology = config.layout.topology;
  Plan plan;
  DeviceState& state = plan.state;
  state.layout = config.layout;
  state.rank = config.rank;
  state.node = topology.node_of(config.rank);
  state.index = topology.index_of(config.rank);
  state.nodes = topology.nodes();
  state.dispatch_row = config.layout.dispatch_row();
  state.combine_row = config.layout.combine_row();
  state.token_tiles = tiles_of(config.layout.max_tokens);
  state.row_tiles = tiles_of(state.capacity());
  state.experts = placement.experts();
  state.local_experts = placement.hosted_by(config.rank);
  state.lost_experts = placement.hosted_by(kNoOwner);
  state.chunk_bytes = config.chunk_bytes;
  state.rails = config.rails;
  state.max_chunks[0] = most_chunks(config, Operation::kDispatch);
  state.max_chunks[1] = most_chunks(config, Operation::kCombine);
  state.signals = memory.signals;
  state.ring = memory.ring;
  state.ring_tail = memory.ring_tail;
  state.ring_capacity = memory.ring_capacity;
  state.timeout_ns = config.timeout_ns;
  state.error = memory.error;
  state.stop = memory.stop;

  Parts parts(memory.workspace);
  parts.take<DeviceState>(1);
  state.homes = parts.take<ExpertHome>(state.experts);
  state.arenas = parts.take<std::byte*>(topology.ranks_per_node);
  plan.image_bytes = parts.used();
  state.ring_head = parts.take<uint64_t>(1);
  state.ring_known_tail = parts.take<uint64_t>(1);
  state.failed = parts.take<uint32_t>(1);
  for (uint32_t channel = 0; channel < config.layout.channels; ++channel) {
    place_channel(config, memory, parts, channel, state);
  }
  plan.bytes = parts.used();
  return plan;
}

}  // namespace

size_t workspace_bytes(const DeviceConfig& config) {
  return plan(config, Placement(config.expert_owner, config.layout.topology.world), {}).bytes;
}

std::vector<std::byte> workspace_image(const DeviceConfig& config, const DeviceMemory& memory) {
  const Topology& topology = config.layout.topology;
  if (memory.arenas.size() != topology.ranks_per_node) {
    throw ConfigurationError("a device needs the arenas of all " + std::to_string(topology.ranks_per_node) +
                             " ranks of its node, but got " + std::to_string(memory.arenas.size()));
  }
  const Placement placement(config.expert_owner, topology.world);
  const Plan made = plan(config, placement, memory);
  const DeviceState& state = made.state;
  std::vector<std::byte> image(made.image_bytes);
  const auto offset = [&](const void* address) {
    return static_cast<const std::byte*>(address) - memory.workspace;
  };
  std::memcpy(image.data(), &state, sizeof state);
  std::memcpy(image.data() + offset(static_cast<const void*>(state.arenas)),
              static_cast<const void*>(memory.arenas.data()), memory.arenas.size() * sizeof(std::byte*));
  const auto destination_of = [&](uint32_t owner) {
    if (owner == kNoOwner) return state.destinations();
    const uint32_t node = topology.node_of(owner);
    return node == state.node ? node + topology.index_of(owner) : state.destination_of(node);
  };
  std::vector<ExpertHome> homes;
  for (uint32_t expert = 0; expert < state.experts; ++expert) {
    const auto id = static_cast<int32_t>(expert);
    homes.push_back({.destination = destination_of(placement.owner(id)), .local = placement.local(id)});
  }
  std::memcpy(image.data() + offset(state.homes), homes.data(), homes.size() * sizeof(ExpertHome));
  return image;
}

}  // namespace efa_ep::cuda
