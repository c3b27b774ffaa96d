// dispatch_send, in two kernels: route, which finds out where every token goes, and stage, which writes the
// rows and hands them over. Nothing leaves before all ids have been checked.
#include "cuda/quantise.cuh"
#include "cuda/rows.cuh"
#include "cuda/submit.cuh"
#include "cuda/tiles.cuh"
#include "cuda/times.cuh"

namespace efa_ep::cuda {
namespace {

DP_DEVICE Context context_of(const DeviceState* state, uint32_t channel) {
  return {*state, state->channels[channel], channel, Half::kDispatchSend};
}

DP_DEVICE uint32_t tokens_of(const DispatchInput& input) {
  return input.tokens_on_device != nullptr ? static_cast<uint32_t>(*input.tokens_on_device) : input.tokens;
}

DP_DEVICE int64_t id_at(const DispatchInput& input, size_t entry) {
  return input.ids_are_64_bit ? static_cast<const int64_t*>(input.ids)[entry]
                              : static_cast<const int32_t*>(input.ids)[entry];
}

DP_DEVICE void mark_tokens(const Context& at, const DispatchInput& input, uint32_t tokens,
                           TileScratch& scratch) {
  const DeviceState& device = at.device;
  const uint32_t top_k = at.layout().row.top_k;
  const auto destination_of = [&](uint32_t token, uint32_t slot) -> uint32_t {
    const int64_t id = id_at(input, size_t{token} * top_k + slot);
    if (id >= 0 && id < device.experts) return device.homes[id].destination;
    if (id != -1) fail(at, Fault::kExpertId, device.rank, id);
    return device.destinations();
  };
  for (uint32_t tile = warp_in_grid(); tile < tiles_of(tokens); tile += warps_in_grid()) {
    mark_tile(scratch, at.channel.sent, device.token_tiles, tile, device.destinations(), tokens, top_k,
              destination_of);
  }
}

DP_DEVICE bool is_lost(const DeviceState& device, int64_t id) {
  return id >= 0 && device.homes[id].destination == device.destinations();
}

/// Counts the slots that name experts of lost ranks. All ids are in range: the host learns of others before.
DP_DEVICE void count_dropped(const Context& at, const DispatchInput& input, uint32_t tokens) {
  const size_t entries = size_t{tokens} * at.layout().row.top_k;
  uint32_t slots = 0;
  int64_t weight = 0;
  for (size_t entry = blockIdx.x * kThreads + threadIdx.x; entry < entries; entry += gridDim.x * kThreads) {
    const int64_t id = id_at(input, entry);
    if (id >= at.device.experts || !is_lost(at.device, id)) continue;
    ++slots;
    weight += ChannelTotals::weight_units(__float_as_uint(input.weights[entry]));
  }
  if (slots == 0) return;
  ChannelTotals& totals = at.counters().totals;
  dp::atom_add_gpu(&totals.dropped_slots, slots);
  dp::atom_add_gpu(&totals.dropped_weight, static_cast<uint64_t>(weight));
}

/// Tells the host of the round, and whoever waits there for its beginning.
DP_DEVICE void publish_totals(const Context& at) {
  const ChannelTotals& totals = at.counters().totals;
  dp::st_relaxed_sys(&at.channel.totals->tokens, totals.tokens);
  dp::st_relaxed_sys(&at.channel.totals->dropped_slots, totals.dropped_slots);
  dp::st_relaxed_sys(&at.channel.totals->dropped_weight, totals.dropped_weight);
  dp::st_relaxed_sys(&at.channel.totals->rounds, totals.rounds);
}

/// Starts the round. Called by the last block of route_tokens(), when all tokens are marked.
DP_DEVICE void start_round(const Context& at, uint32_t tokens) {
  const DeviceState& device = at.device;
  for (uint32_t set = warp_id(); set < device.destinations(); set += kWarps) {
    const uint32_t rows = count_set(at.channel.sent + size_t{set} * device.token_tiles, tiles_of(tokens));
    if (lane_id() != 0) continue;
    at.channel.sent_rows[set] = rows;
    ChannelTotals& totals = at.counters().totals;
    dp::atom_add_gpu(device.is_own_node(set) ? &totals.peer_rows : &totals.network_rows, rows);
  }
  clear_ready_rows(at, Operation::kDispatch);
  clear_ready_rows(at, Operation::kCombine);
  if (threadIdx.x == 0) {
    at.counters().tokens = tokens;
    ++at.counters().round;
    at.counters().totals.tokens += tokens;
    ++at.counters().totals.rounds;
    publish_totals(at);
  }
}

/// The first 4-byte words of a row: token, ids, weights, padding. A slot whose expert is lost travels as one
/// that the caller dropped, so no other rank needs to know.
DP_DEVICE uint32_t header_word(const DeviceState& device, const DispatchInput& input, uint32_t token,
                               uint32_t word) {
  const uint32_t top_k = device.layout.row.top_k;
  const size_t entry = size_t{token} * top_k;
  if (word == 0) return token;
  if (word <= top_k) {
    const int64_t id = id_at(input, entry + word - 1);
    return static_cast<uint32_t>(device.lost_experts > 0 && is_lost(device, id) ? -1 : id);
  }
  if (word <= 2 * top_k) return __float_as_uint(input.weights[entry + word - 1 - top_k]);
  return 0;
}

DP_DEVICE void write_header(const Context& at, const DispatchInput& input, uint32_t token, const RowList& to,
                            uint32_t count) {
  const auto vectors = static_cast<uint32_t>(at.layout().row.payload_offset() / kVectorBytes);
  for (uint32_t vector = lane_id(); vector < vectors; vector += 32) {
    const auto word = [&](uint32_t i) { return header_word(at.device, input, token, 4 * vector + i); };
    const uint4 value{word(0), word(1), word(2), word(3)};
    for (uint32_t i = 0; i < count; ++i) dp::st_na(to.row[i] + size_t{vector} * kVectorBytes, value);
  }
}

/// Lists the rows that a token goes to: one per remote node in its order, or one that only the own node
/// reads. Returns how many; `first_row` becomes the number of the first.
DP_DEVICE uint32_t list_rows(const Context& at, uint32_t token, RowList& rows, uint32_t& first_row) {
  const DeviceState& device = at.device;
  std::byte* staging = at.arena() + at.channel.outgoing[static_cast<uint32_t>(Operation::kDispatch)];
  uint32_t count = 0;
  bool own_node = false;
  for (uint32_t first = 0; first < device.destinations(); first += 32) {
    const uint32_t destination = first + lane_id();
    Tile tile;
    if (destination < device.destinations()) {
      tile = at.channel.sent[size_t{destination} * device.token_tiles + token / kTileRows];
    }
    const bool member = contains(tile, token);
    const bool remote = member && !device.is_own_node(destination);
    const uint32_t remotes = __ballot_sync(kFullWarp, remote);
    own_node |= __any_sync(kFullWarp, member && !remote) != 0;
    uint32_t row = 0;
    if (remote) {
      row = at.layout().staged_row(device.node, device.node_of(destination)) + place_of(tile, token);
      rows.row[count + __popc(remotes & lanes_below())] = staging + row * device.dispatch_row;
    }
    if (count == 0 && remotes != 0) first_row = __shfl_sync(kFullWarp, row, __ffs(remotes) - 1);
    count += __popc(remotes);
  }
  if (count == 0 && own_node) {
    first_row = at.layout().own_node_row() + token;
    if (lane_id() == 0) rows.row[0] = staging + first_row * device.dispatch_row;
    count = 1;
  }
  __syncwarp();
  return count;
}

/// Tells the own node's owners of a token where its row is. They learn of it when the lists are published.
DP_DEVICE void list_for_owners(const Context& at, uint32_t token, uint32_t row) {
  const DeviceState& device = at.device;
  for (uint32_t owner = lane_id(); owner < device.ranks_per_node(); owner += 32) {
    const Tile tile = at.channel.sent[size_t{device.node + owner} * device.token_tiles + token / kTileRows];
    if (contains(tile, token)) row_list(at, device.index, device.node, owner)[place_of(tile, token)] = row;
  }
}

/// Hands over the chunks that this token completes. The lanes do so together, which costs one fence.
DP_DEVICE void hand_over(const Context& at, uint32_t token) {
  const DeviceState& device = at.device;
  for (uint32_t destination = lane_id(); destination < device.destinations(); destination += 32) {
    const Tile tile = at.channel.sent[size_t{destination} * device.token_tiles + token / kTileRows];
    if (device.is_own_node(destination) || !contains(tile, token)) continue;
    const uint32_t node = device.node_of(destination);
    row_is_ready(at, Operation::kDispatch, node, at.channel.sent_rows[destination], place_of(tile, token),
                 at.layout().staged_row(device.node, node));
  }
}

template <Quantisation kQuantisation>
DP_DEVICE void stage_token(const Context& at, const DispatchInput& input, uint32_t token, RowList& rows) {
  const RowShape& shape = at.layout().row;
  const std::byte* x = input.x + token * input.x_stride;
  uint32_t first_row = 0;
  uint32_t count = list_rows(at, token, rows, first_row);
  if (count == 0) return;
  write_header(at, input, token, rows, count);
  if constexpr (kQuantisation == Quantisation::kNone) {
    for (uint32_t i = 0; i < count && shape.scale_bytes > 0; ++i) {
      copy_bytes(input.scales + size_t{token} * shape.scale_bytes, rows.row[i] + shape.scales_offset(),
                 shape.scale_bytes);
    }
    // A row that is produced in activations() and stays in the own node has its payload.
    const bool in_place = rows.row[0] + shape.payload_offset() == x;
    if (!in_place) copy_vectors(x, rows, count, shape.payload_offset(), shape.payload_bytes);
  } else {
    quantise_row<kQuantisation>(x, rows, count, shape.payload_offset(), shape.scales_offset(),
                                shape.payload_bytes);
  }
  list_for_owners(at, token, first_row);
  __syncwarp();
  hand_over(at, token);
}

/// Tells the ranks of the own node which rows are for them.
DP_DEVICE void publish_lists(const Context& at) {
  const DeviceState& device = at.device;
  for (uint32_t owner = threadIdx.x; owner < device.ranks_per_node(); owner += kThreads) {
    const RoundWord word{at.counters().round, at.channel.sent_rows[device.node + owner]};
    dp::st_release_sys(flag_at(at, owner, at.channel.dispatch_flags, device.node, device.index),
                       word.encode());
  }
}

}  // namespace

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    route_tokens(const DeviceState* __restrict__ state, uint32_t channel, const DispatchInput input) {
  DP_SHARED_ARRAY(TileScratch, scratch, kWarps);
  const Context at = context_of(state, channel);
  note_begin(at.clock_of(at.counters().round + 1));
  const uint32_t tokens = tokens_of(input);
  if (block_may_run(at.device)) {
    if (tokens > input.tokens) {
      fail(at, Fault::kTooManyTokens, at.device.rank, static_cast<int32_t>(tokens));
    } else {
      mark_tokens(at, input, tokens, scratch[warp_id()]);
      if (at.device.lost_experts > 0) count_dropped(at, input, tokens);
    }
  }
  if (is_last_block(at) && block_may_run(at.device)) start_round(at, tokens);
}

template <Quantisation kQuantisation>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    stage_tokens(const DeviceState* __restrict__ state, uint32_t channel, const DispatchInput input) {
  DP_SHARED_ARRAY(RowList, rows, kWarps);
  const Context at = context_of(state, channel);
  if (block_may_run(at.device)) {
    if (warp_in_grid() == 0) {
      submit_empty(at, Operation::kDispatch,
                   [&](uint32_t node) { return at.channel.sent_rows[at.device.destination_of(node)]; });
    }
    for (uint32_t token = warp_in_grid(); token < at.counters().tokens; token += warps_in_grid()) {
      stage_token<kQuantisation>(at, input, token, rows[warp_id()]);
      __syncwarp();
    }
  }
  if (is_last_block(at) && block_may_run(at.device)) {
    publish_lists(at);
    note_end(at);
  }
}

void launch_dispatch_send(const HalfLaunch& launch, const DispatchInput& input) {
  const dim3 grid(launch.num_sms);
  const dim3 block(kThreads);
  DP_LAUNCH(route_tokens, grid, block, 0, launch.stream, launch.state, launch.channel, input);
  switch (input.quantisation) {
    case Quantisation::kNone:
      DP_LAUNCH(stage_tokens<Quantisation::kNone>, grid, block, 0, launch.stream, launch.state,
                launch.channel, input);
      break;
    case Quantisation::kFp8:
      DP_LAUNCH(stage_tokens<Quantisation::kFp8>, grid, block, 0, launch.stream, launch.state, launch.channel,
                input);
      break;
    case Quantisation::kFp8PowerOf2:
      DP_LAUNCH(stage_tokens<Quantisation::kFp8PowerOf2>, grid, block, 0, launch.stream, launch.state,
                launch.channel, input);
      break;
    case Quantisation::kFp8Ue8m0:
      DP_LAUNCH(stage_tokens<Quantisation::kFp8Ue8m0>, grid, block, 0, launch.stream, launch.state,
                launch.channel, input);
      break;
  }
}

}  // namespace efa_ep::cuda
