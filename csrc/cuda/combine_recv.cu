// combine_recv, in two kernels. sum makes the node's sums for the sources of the own rail and sends them; it
// waits for ranks of the own node only, which have sent their results before they wait for anybody. gather
// waits for what the own tokens' nodes send, and writes the output.
#include "cuda/submit.cuh"
#include "cuda/sums.cuh"
#include "cuda/tiles.cuh"
#include "cuda/times.cuh"

namespace efa_ep::cuda {
namespace {

DP_DEVICE Context context_of(const DeviceState* state, uint32_t channel, uint32_t waiting_kernel) {
  return {*state, state->channels[channel], channel, Half::kCombineRecv, waiting_kernel};
}

/// Waits for an owner's results for this rail's source on `source_node`, `rows` of them. Returns where they
/// are, or null after a fault. The place comes from another rank, so it is checked.
DP_DEVICE const std::byte* wait_for_results(const Context& at, uint32_t source_node, uint32_t owner,
                                            uint32_t rows) {
  const DeviceState& device = at.device;
  const uint32_t rank = at.layout().topology.rank_at(device.node, owner);
  const uint64_t* flag = flag_at(at, device.index, at.channel.result_flags, source_node, owner);
  RoundWord word;
  if (!wait_for_round(at, flag, rank, word)) return nullptr;
  const uint64_t first = dp::ld_relaxed_sys(flag + 1);
  if (word.rows != rows || first > device.capacity() - rows) {
    fail(at, Fault::kRowCount, rank, word.rows);
    return nullptr;
  }
  return device.arenas[owner] + at.channel.results + first * device.combine_row;
}

/// Lists, in ascending order, a row's terms: a set that contains it contributes the row at its place among
/// the rows that start at first_rows[set].
DP_DEVICE uint32_t list_terms(const Tile* sets, uint32_t tiles_per_set, uint32_t count,
                              const std::byte* const* first_rows, uint64_t row_bytes, uint32_t row,
                              RowList& terms) {
  uint32_t listed = 0;
  for (uint32_t first = 0; first < count; first += 32) {
    const uint32_t set = first + lane_id();
    Tile tile;
    if (set < count) tile = sets[size_t{set} * tiles_per_set + row / kTileRows];
    const bool member = contains(tile, row);
    const uint32_t members = __ballot_sync(kFullWarp, member);
    if (member) {
      const uint32_t term = listed + __popc(members & lanes_below());
      terms.row[term] = const_cast<std::byte*>(first_rows[set]) + place_of(tile, row) * row_bytes;
      terms.weight[term] = 1.0f;
    }
    listed += __popc(members);
  }
  __syncwarp();
  return listed;
}

/// Where the results for this rail's source on another node are, of an owner. Null after a fault.
DP_DEVICE const std::byte* results_for_rail(const Context& at, uint32_t node, uint32_t owner) {
  const DeviceState& device = at.device;
  const uint32_t slot = Topology::slot_of(device.node, node);
  if (owner != device.index) {
    return wait_for_results(at, node, owner,
                            at.channel.forwarded_rows[slot * device.ranks_per_node() + owner]);
  }
  const uint32_t source = at.layout().topology.rail_peer(device.rank, node);
  return at.arena() + at.channel.results + at.channel.first_row[source] * device.combine_row;
}

template <ScalarType kType>
DP_DEVICE void sum_for_node(const Context& at, uint32_t node, uint32_t row, const std::byte* const* results,
                            StagedReads<SumStages>& reads, RowList& terms) {
  const DeviceState& device = at.device;
  const uint32_t owners = device.ranks_per_node();
  const uint32_t slot = Topology::slot_of(device.node, node);
  const uint32_t staged = at.layout().staged_row(device.node, node);
  const uint32_t count =
      list_terms(at.channel.forwarded + size_t{slot} * owners * device.token_tiles, device.token_tiles,
                 owners, results + slot * owners, device.combine_row, row, terms);
  std::byte* out = at.arena() + at.channel.outgoing[static_cast<uint32_t>(Operation::kCombine)] +
                   (staged + row) * device.combine_row;
  sum_rows<kType>(reads, out, terms, count, static_cast<uint32_t>(device.combine_row));
  __syncwarp();
  if (lane_id() == 0) row_is_ready(at, Operation::kCombine, node, at.channel.slot_rows[slot], row, staged);
}

/// Waits until a destination of the own tokens has answered. Returns where the answers are, in the order of
/// the tokens, or null after a fault.
DP_DEVICE const std::byte* wait_for_answers(const Context& at, uint32_t destination) {
  const DeviceState& device = at.device;
  const uint32_t rows = at.channel.sent_rows[destination];
  if (device.is_own_node(destination)) {
    return wait_for_results(at, device.node, destination - device.node, rows);
  }
  const uint32_t node = device.node_of(destination);
  const uint32_t rank = at.layout().topology.rail_peer(device.rank, node);
  RoundWord word;
  if (!wait_for_round(at, arrival_of(at, Operation::kCombine, node), rank, word)) return nullptr;
  if (word.rows != rows) {
    fail(at, Fault::kRowCount, rank, word.rows);
    return nullptr;
  }
  const size_t slot = Topology::slot_of(device.node, node);
  return at.arena() + at.channel.slots[static_cast<uint32_t>(Operation::kCombine)] +
         slot * at.layout().max_tokens * device.combine_row;
}

}  // namespace

template <ScalarType kType>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_rail(const DeviceState* __restrict__ state, uint32_t channel) {
  DP_SHARED_ARRAY(RowList, terms, kWarps);
  DP_SHARED_ARRAY(SumStages, stages, kWarps);
  DP_SHARED_ARRAY(const std::byte*, results, kMaxRanks);
  const Context at = context_of(state, channel, 0);
  const DeviceState& device = at.device;
  note_begin(at.clock());
  if (!block_may_run(device)) return;
  const uint32_t owners = device.ranks_per_node();
  bool ready = true;
  for (uint32_t i = threadIdx.x; ready && i < (device.nodes - 1) * owners; i += kThreads) {
    const uint32_t slot = i / owners;
    results[i] = results_for_rail(at, slot < device.node ? slot : slot + 1, i % owners);
    ready = results[i] != nullptr;
  }
  if (!__syncthreads_and(ready)) return;
  if (warp_in_grid() == 0) {
    submit_empty(at, Operation::kCombine,
                 [&](uint32_t node) { return at.channel.slot_rows[Topology::slot_of(device.node, node)]; });
  }
  StagedReads reads(stages[warp_id()]);
  // Starting behind the own node, as everywhere.
  uint32_t row = warp_in_grid();
  for (uint32_t step = 1; step < device.nodes; ++step) {
    const uint32_t node = (device.node + step) % device.nodes;
    const uint32_t rows = at.channel.slot_rows[Topology::slot_of(device.node, node)];
    for (; row < rows; row += warps_in_grid()) {
      sum_for_node<kType>(at, node, row, results, reads, terms[warp_id()]);
      __syncwarp();
    }
    row -= rows;
  }
}

template <ScalarType kType>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gather_tokens(const DeviceState* __restrict__ state, uint32_t channel, std::byte* out) {
  DP_SHARED_ARRAY(RowList, terms, kWarps);
  DP_SHARED_ARRAY(SumStages, stages, kWarps);
  DP_SHARED_ARRAY(const std::byte*, answers, kMaxRanks);
  const Context at = context_of(state, channel, 1);
  const DeviceState& device = at.device;
  if (device.nodes == 1 || device.ranks_per_node() == 1) note_begin(at.clock());
  if (!block_may_run(device)) return;
  bool ready = true;
  for (uint32_t i = threadIdx.x; ready && i < device.destinations(); i += kThreads) {
    answers[i] = wait_for_answers(at, i);
    ready = answers[i] != nullptr;
  }
  // The next round's rows take the place of those that this round's writes came from.
  if (threadIdx.x == 0 && ready) ready = wait_until_sent(at, Operation::kDispatch);
  if (!__syncthreads_and(ready)) return;
  StagedReads reads(stages[warp_id()]);
  for (uint32_t token = warp_in_grid(); token < at.counters().tokens; token += warps_in_grid()) {
    const uint32_t count = list_terms(at.channel.sent, device.token_tiles, device.destinations(), answers,
                                      device.combine_row, token, terms[warp_id()]);
    sum_rows<kType>(reads, out + token * device.combine_row, terms[warp_id()], count,
                    static_cast<uint32_t>(device.combine_row));
    __syncwarp();
  }
  note_end(at);
}

namespace {

template <ScalarType kType>
void launch_both(const HalfLaunch& launch, std::byte* out) {
  const dim3 grid(launch.num_sms);
  const dim3 block(kThreads);
  if (launch.nodes > 1 && launch.ranks_per_node > 1) {
    DP_LAUNCH(sum_rail<kType>, grid, block, 0, launch.stream, launch.state, launch.channel);
  }
  DP_LAUNCH(gather_tokens<kType>, grid, block, 0, launch.stream, launch.state, launch.channel, out);
}

}  // namespace

void launch_combine_recv(const HalfLaunch& launch, std::byte* out) {
  switch (launch.combine_type) {
    case ScalarType::kBfloat16:
      return launch_both<ScalarType::kBfloat16>(launch, out);
    case ScalarType::kFloat16:
      return launch_both<ScalarType::kFloat16>(launch, out);
    case ScalarType::kFloat32:
      return launch_both<ScalarType::kFloat32>(launch, out);
  }
}

}  // namespace efa_ep::cuda
