// dispatch_recv, in three kernels. forward takes the slots of the own rail as they arrive and tells the ranks
// of the node which rows are for them; take waits for all sources and finds every row that is for this rank;
// pack writes them out. forward waits for other nodes only, and take only for what kernels before it send, so
// no wait depends on which blocks run at the same time.
#include "cuda/payloads.cuh"
#include "cuda/rows.cuh"
#include "cuda/tiles.cuh"
#include "cuda/times.cuh"

namespace efa_ep::cuda {
namespace {

DP_DEVICE Context context_of(const DeviceState* state, uint32_t channel, uint32_t waiting_kernel) {
  return {*state, state->channels[channel], channel, Half::kDispatchRecv, waiting_kernel};
}

/// Called by all blocks of the half's first kernel when they start. The first one's last warp, which has
/// least to do, counts the last round.
DP_DEVICE bool begin_half(const Context& at) {
  note_begin(at.clock());
  if (!block_may_run(at.device)) return false;
  if (blockIdx.x == 0 && warp_id() == kWarps - 1) count_last_round(at);
  return true;
}

DP_DEVICE const std::byte* slot_of(const Context& at, uint32_t source_node) {
  const auto op = static_cast<uint32_t>(Operation::kDispatch);
  return at.arena() + at.channel.slots[op] +
         size_t{Topology::slot_of(at.device.node, source_node)} * at.layout().max_tokens *
             at.device.dispatch_row;
}

// ---- forward -------------------------------------------------------------------------------------------

/// Slots that a block has found complete and not forwarded yet.
struct Arrivals {
  uint32_t count;
  uint32_t nodes[kMaxNodes];
  uint32_t rows[kMaxNodes];
};

/// The blocks share the other nodes out among them, starting behind the own one.
DP_DEVICE uint32_t nodes_of_block(const DeviceState& device) {
  const uint32_t others = device.nodes - 1;
  return blockIdx.x < others ? (others - 1 - blockIdx.x) / gridDim.x + 1 : 0;
}

/// Waits until at least one of the block's `nodes` slots is complete, and lists all that are. Called by one
/// warp; a lane's bits in `done` are the slots that it has listed. Lists none after a fault.
DP_DEVICE void watch_slots(const Context& at, uint32_t nodes, uint32_t& done, Arrivals& arrived) {
  const DeviceState& device = at.device;
  if (lane_id() == 0) arrived.count = 0;
  __syncwarp();
  bool found = false;
  bool failed = false;
  Deadline deadline(at, device.rank);
  while (!__any_sync(kFullWarp, found || failed)) {
    bool waiting = false;
    for (uint32_t i = lane_id(), bit = 1; i < nodes && !failed; i += 32, bit *= 2) {
      if ((done & bit) != 0) continue;
      const uint32_t node = (device.node + 1 + blockIdx.x + i * gridDim.x) % device.nodes;
      const uint32_t source = at.layout().topology.rail_peer(device.rank, node);
      const uint64_t* flag = arrival_of(at, Operation::kDispatch, node);
      const RoundWord word = RoundWord::decode(dp::ld_acquire_sys(flag));
      if (word.round != at.counters().round) {
        waiting = true;
        deadline.watch(source);
      } else if (word.rows > at.layout().max_tokens) {
        fail(at, Fault::kRowCount, source, word.rows);
        failed = true;
      } else {
        const uint32_t place = atomicAdd(&arrived.count, 1);
        arrived.nodes[place] = node;
        arrived.rows[place] = word.rows;
        done |= bit;
        found = true;
        deadline.watch(source);
        deadline.met();
      }
    }
    if (waiting && !found && !failed) failed = deadline.expired();
  }
  failed = __any_sync(kFullWarp, failed);
  __syncwarp();
  if (failed && lane_id() == 0) arrived.count = 0;
}

/// Writes the numbers of a set's rows, in order. All lanes of a warp call it together.
DP_DEVICE void write_list(const Tile* set, uint32_t tiles, uint32_t* list) {
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    if (contains(set[tile], lane_id())) list[place_of(set[tile], lane_id())] = tile * kTileRows + lane_id();
  }
}

/// Offers the rows of one slot to the ranks of the own node. Called by a whole block.
DP_DEVICE void forward_slot(const Context& at, uint32_t source_node, uint32_t rows, TileScratch& scratch) {
  const DeviceState& device = at.device;
  const uint32_t owners = device.ranks_per_node();
  const uint32_t slot = Topology::slot_of(device.node, source_node);
  const std::byte* first = slot_of(at, source_node);
  Tile* sets = at.channel.forwarded + size_t{slot} * owners * device.token_tiles;
  const auto owner_of = [&](uint32_t row, uint32_t k) -> uint32_t {
    const int32_t id = ids_of(first + row * device.dispatch_row)[k];
    if (id >= 0 && static_cast<uint32_t>(id) < device.experts) {
      return device.homes[id].destination - device.node;  // of another node: no owner's number
    }
    if (id >= 0) fail(at, Fault::kRowExpert, at.layout().topology.rail_peer(device.rank, source_node), id);
    return owners;
  };
  for (uint32_t tile = warp_id(); tile < tiles_of(rows); tile += kWarps) {
    mark_tile(scratch, sets, device.token_tiles, tile, owners, rows, at.layout().row.top_k, owner_of);
  }
  __syncthreads();
  for (uint32_t owner = warp_id(); owner < owners; owner += kWarps) {
    Tile* set = sets + size_t{owner} * device.token_tiles;
    const uint32_t listed = count_set(set, tiles_of(rows));
    __syncwarp();
    write_list(set, tiles_of(rows), row_list(at, device.index, source_node, owner));
    __syncwarp();
    if (lane_id() != 0) continue;
    at.channel.forwarded_rows[slot * owners + owner] = listed;
    // Own rows of the own rail are summed here, and so are no rows for peers: take_rows() counts them as
    // such.
    const uint64_t for_peers = owner == device.index ? 0 - uint64_t{listed} : listed;
    dp::atom_add_gpu(&at.counters().totals.peer_rows, for_peers);
    if (owner == device.index) continue;
    const RoundWord word{at.counters().round, listed};
    dp::st_release_sys(flag_at(at, owner, at.channel.dispatch_flags, source_node, device.index),
                       word.encode());
  }
  if (threadIdx.x == 0) {
    at.channel.slot_rows[slot] = rows;
    dp::atom_add_gpu(&at.counters().totals.network_rows, rows);  // as many sums go back
  }
}

// ---- take ----------------------------------------------------------------------------------------------

/// Waits until source rank `source` has said how many rows it has for this rank. False after a fault.
DP_DEVICE bool wait_for_source(const Context& at, uint32_t source, uint32_t& rows) {
  const DeviceState& device = at.device;
  const Topology& topology = at.layout().topology;
  const uint32_t node = topology.node_of(source);
  const uint32_t holder = topology.index_of(source);
  if (node != device.node && holder == device.index) {
    const uint32_t slot = Topology::slot_of(device.node, node);
    rows = at.channel.forwarded_rows[slot * device.ranks_per_node() + device.index];
    return true;
  }
  RoundWord word;
  const uint64_t* flag = flag_at(at, device.index, at.channel.dispatch_flags, node, holder);
  const uint32_t through = topology.rank_at(device.node, holder);
  if (!wait_for_round(at, flag, through, word)) return false;
  rows = word.rows;
  if (rows <= at.layout().max_tokens) return true;
  fail(at, Fault::kRowCount, source, rows);
  return false;
}

/// Turns counts into the number of rows before each source; first_row[world] is their sum. Called by a warp.
DP_DEVICE void count_sources(uint32_t* first_row, uint32_t world) {
  uint32_t total = 0;
  for (uint32_t first = 0; first < world; first += 32) {
    const uint32_t source = first + lane_id();
    const uint32_t rows = source < world ? first_row[source] : 0;
    const uint32_t sum = inclusive_sum(rows);
    __syncwarp();
    if (source < world) first_row[source] = total + sum - rows;
    total += __shfl_sync(kFullWarp, sum, 31);
  }
  if (lane_id() == 0) first_row[world] = total;
}

/// The source of a received row: the last one whose first row is not after it.
DP_DEVICE uint32_t source_of(const uint32_t* first_row, uint32_t world, uint32_t row) {
  uint32_t low = 0;
  uint32_t high = world;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (first_row[middle] <= row ? low : high) = middle;
  }
  return low;
}

/// Where a received row lies, or null after a fault.
DP_DEVICE const std::byte* find_row(const Context& at, const uint32_t* first_row, uint32_t row) {
  const DeviceState& device = at.device;
  const Topology& topology = at.layout().topology;
  const uint32_t source = source_of(first_row, device.world(), row);
  const uint32_t node = topology.node_of(source);
  const uint32_t holder = topology.index_of(source);
  const uint32_t number = row_list(at, holder, node, device.index)[row - first_row[source]];
  const uint32_t rows = (node == device.node ? device.nodes : 1) * at.layout().max_tokens;
  if (number >= rows) {
    fail(at, Fault::kRowNumber, topology.rank_at(device.node, holder), number);
    return nullptr;
  }
  const auto op = static_cast<uint32_t>(Operation::kDispatch);
  const std::byte* section = device.arenas[holder];
  section += node == device.node ? at.channel.outgoing[op]
                                 : slot_of(at, node) - at.arena();  // slots lie alike in all arenas
  return section + number * device.dispatch_row;
}

/// The local number of an expert, if it is one of this rank's; else a number beyond the last.
DP_DEVICE uint32_t own_expert(const Context& at, int32_t id) {
  const DeviceState& device = at.device;
  if (id < 0) return device.local_experts;
  if (static_cast<uint32_t>(id) >= device.experts) {
    fail(at, Fault::kRowExpert, device.rank, id);
    return device.local_experts;
  }
  const ExpertHome home = device.homes[id];
  return home.destination == device.node + device.index ? home.local : device.local_experts;
}

/// Finds the rows of this rank, and in the per_expert layout marks those of each expert.
DP_DEVICE void find_rows(const Context& at, const uint32_t* first_row, bool per_expert,
                         TileScratch& scratch) {
  const DeviceState& device = at.device;
  const uint32_t rows = first_row[device.world()];
  for (uint32_t tile = warp_in_grid(); tile < tiles_of(rows); tile += warps_in_grid()) {
    const uint32_t row = tile * kTileRows + lane_id();
    const std::byte* place = row < rows ? find_row(at, first_row, row) : nullptr;
    if (row < rows) at.channel.received[row] = place;
    if (!per_expert) continue;
    const auto expert_of = [&](uint32_t, uint32_t slot) {
      return place == nullptr ? device.local_experts : own_expert(at, ids_of(place)[slot]);
    };
    mark_tile(scratch, at.channel.of_expert, device.row_tiles, tile, device.local_experts, rows,
              at.layout().row.top_k, expert_of);
  }
}

/// Counts the round's rows, and tells the host.
DP_DEVICE void count_received(const Context& at, uint32_t rows) {
  ChannelTotals& totals = at.counters().totals;
  totals.received_rows += rows;
  totals.peer_rows += rows;  // their results are offered to the node
  dp::st_relaxed_sys(&at.channel.totals->received_rows, totals.received_rows);
  dp::st_relaxed_sys(&at.channel.totals->network_rows, totals.network_rows);
  dp::st_relaxed_sys(&at.channel.totals->peer_rows, totals.peer_rows);
}

// ---- pack ----------------------------------------------------------------------------------------------

/// Writes what belongs to a row, and lists where its payload goes. Returns how many places these are.
DP_DEVICE uint32_t pack_per_token(const Context& at, const std::byte* row, uint32_t place,
                                  const DispatchOutput& output, RowList& to) {
  const RowShape& shape = at.layout().row;
  const uint32_t slot = lane_id();
  if (slot < shape.top_k) {
    const int32_t id = ids_of(row)[slot];
    output.ids[size_t{place} * shape.top_k + slot] = id;
    output.weights[size_t{place} * shape.top_k + slot] = weights_of(at, row)[slot];
    const uint32_t expert = own_expert(at, id);
    if (expert < at.device.local_experts) atomicAdd(&output.tokens_per_expert[expert], 1);
  }
  if (lane_id() == 0) to.row[0] = output.x + size_t{place} * shape.payload_bytes;
  if (shape.scale_bytes > 0) {
    copy_bytes(row + shape.scales_offset(), output.scales + size_t{place} * shape.scale_bytes,
               shape.scale_bytes);
  }
  return 1;
}

/// The same. A token that names an expert twice gets one row there.
DP_DEVICE uint32_t pack_per_expert(const Context& at, const std::byte* row, uint32_t number,
                                   const DispatchOutput& output, RowList& to) {
  const DeviceState& device = at.device;
  const RowShape& shape = at.layout().row;
  const uint32_t slot = lane_id();
  const uint32_t expert = slot < shape.top_k ? own_expert(at, ids_of(row)[slot]) : device.local_experts;
  const uint32_t same = __match_any_sync(kFullWarp, expert);
  const bool first = expert < device.local_experts && (same & lanes_below()) == 0;
  const uint32_t firsts = __ballot_sync(kFullWarp, first);
  size_t place = 0;
  if (first) {
    const Tile tile = at.channel.of_expert[size_t{expert} * device.row_tiles + number / kTileRows];
    place = size_t{expert} * device.capacity() + place_of(tile, number);
    to.row[__popc(firsts & lanes_below())] = output.x + place * shape.payload_bytes;
  }
  for (uint32_t left = firsts; left != 0 && shape.scale_bytes > 0; left &= left - 1) {
    const size_t scales = __shfl_sync(kFullWarp, place, __ffs(left) - 1) * shape.scale_bytes;
    copy_bytes(row + shape.scales_offset(), output.scales + scales, shape.scale_bytes);
  }
  return __popc(firsts);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    forward_slots(const DeviceState* __restrict__ state, uint32_t channel) {
  DP_SHARED_ARRAY(TileScratch, scratch, kWarps);
  DP_SHARED(Arrivals, arrived);
  const Context at = context_of(state, channel, 0);
  if (!begin_half(at)) return;
  uint32_t done = 0;
  const uint32_t nodes = nodes_of_block(at.device);
  for (uint32_t taken = 0; taken < nodes; taken += arrived.count) {
    __syncthreads();  // all have read arrived.count
    if (warp_id() == 0) watch_slots(at, nodes, done, arrived);
    __syncthreads();
    if (arrived.count == 0) return;  // after a fault
    for (uint32_t i = 0; i < arrived.count; ++i) {
      forward_slot(at, arrived.nodes[i], arrived.rows[i], scratch[warp_id()]);
    }
  }
}

template <bool kPerExpert>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    take_rows(const DeviceState* __restrict__ state, uint32_t channel, const DispatchOutput output) {
  DP_SHARED_ARRAY(TileScratch, scratch, kWarps);
  DP_SHARED_ARRAY(uint32_t, first_row, kMaxRanks + 1);
  const Context at = context_of(state, channel, 1);
  const DeviceState& device = at.device;
  bool ready = device.nodes == 1 ? begin_half(at) : block_may_run(device);
  if (ready) {
    // The caller may write into the results next, from which the last round's writes went if there is one
    // rank per node; otherwise into the combine staging.
    bool mine = threadIdx.x != 0 || wait_until_sent(at, Operation::kCombine);
    for (uint32_t source = threadIdx.x; mine && source < device.world(); source += kThreads) {
      mine = wait_for_source(at, source, first_row[source]);
    }
    ready = __syncthreads_and(mine);
  }
  if (ready) {
    if (warp_id() == 0) count_sources(first_row, device.world());
    __syncthreads();
    find_rows(at, first_row, kPerExpert, scratch[warp_id()]);
  }
  const bool last = is_last_block(at);
  if (!ready || !last || !block_may_run(device)) return;
  for (uint32_t source = threadIdx.x; source <= device.world(); source += kThreads) {
    at.channel.first_row[source] = first_row[source];
  }
  const uint32_t rows = first_row[device.world()];
  for (uint32_t expert = warp_id(); expert < device.local_experts; expert += kWarps) {
    uint32_t of_expert = 0;
    if constexpr (kPerExpert) {
      of_expert = count_set(at.channel.of_expert + size_t{expert} * device.row_tiles, tiles_of(rows));
    }
    if (lane_id() == 0) output.tokens_per_expert[expert] = static_cast<int32_t>(of_expert);
  }
  if (threadIdx.x == 0) {
    at.counters().received = rows;
    if (output.rows != nullptr) *output.rows = static_cast<int32_t>(rows);
    count_received(at, rows);
  }
}

template <bool kPerExpert>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pack_rows(const DeviceState* __restrict__ state, uint32_t channel, const DispatchOutput output) {
  DP_SHARED_ARRAY(RowList, lists, kWarps);
  DP_SHARED_ARRAY(PayloadStages, stages, kWarps);
  const Context at = context_of(state, channel, 0);
  if (!block_may_run(at.device)) return;
  RowList& to = lists[warp_id()];
  Payloads payloads(at, stages[warp_id()]);
  for (uint32_t row = warp_in_grid(); row < at.counters().received; row += warps_in_grid()) {
    const std::byte* from = at.channel.received[row];
    const uint32_t places =
        kPerExpert ? pack_per_expert(at, from, row, output, to) : pack_per_token(at, from, row, output, to);
    __syncwarp();
    payloads.write_next(to, places);
    __syncwarp();
  }
  payloads.finish();
  note_end(at);
}

void launch_dispatch_recv(const HalfLaunch& launch, const DispatchOutput& output) {
  const dim3 grid(launch.num_sms);
  const dim3 block(kThreads);
  if (launch.nodes > 1) {
    const dim3 slots(launch.num_sms < launch.nodes - 1 ? launch.num_sms : launch.nodes - 1);
    DP_LAUNCH(forward_slots, slots, block, 0, launch.stream, launch.state, launch.channel);
  }
  if (launch.per_expert) {
    DP_LAUNCH(take_rows<true>, grid, block, 0, launch.stream, launch.state, launch.channel, output);
    DP_LAUNCH(pack_rows<true>, grid, block, 0, launch.stream, launch.state, launch.channel, output);
  } else {
    DP_LAUNCH(take_rows<false>, grid, block, 0, launch.stream, launch.state, launch.channel, output);
    DP_LAUNCH(pack_rows<false>, grid, block, 0, launch.stream, launch.state, launch.channel, output);
  }
}

}  // namespace efa_ep::cuda
