// combine_send, in one kernel: every received row gets one result, the sum over this rank's experts, and
// whoever needs it is told: the network if there is one rank per node, else the rank of the node that shares
// the source's rail.
#include "cuda/submit.cuh"
#include "cuda/sums.cuh"
#include "cuda/tiles.cuh"
#include "cuda/times.cuh"

namespace efa_ep::cuda {
namespace {

DP_DEVICE Context context_of(const DeviceState* state, uint32_t channel) {
  return {*state, state->channels[channel], channel, Half::kCombineSend};
}

/// Lists the expert results that make up one row's, in slot order, and returns how many.
DP_DEVICE uint32_t list_results(const Context& at, const CombineInput& input, bool per_expert, uint32_t row,
                                RowList& terms) {
  const DeviceState& device = at.device;
  const uint32_t top_k = at.layout().row.top_k;
  const uint32_t slot = lane_id();
  auto* rows = const_cast<std::byte*>(input.rows);
  if (!per_expert && !input.per_slot) {
    if (slot == 0) {
      terms.row[0] = rows + row * device.combine_row;
      terms.weight[0] = 1.0f;
    }
    return 1;
  }
  const std::byte* dispatched = at.channel.received[row];
  ExpertHome home;
  bool own = false;
  if (slot < top_k) {
    const int32_t id = ids_of(dispatched)[slot];
    if (id >= 0) home = device.homes[id];  // take_rows() or the router has checked it
    own = id >= 0 && home.destination == device.node + device.index;
  }
  const uint32_t owns = __ballot_sync(kFullWarp, own);
  if (own) {
    const uint32_t term = __popc(owns & lanes_below());
    size_t place = size_t{row} * top_k + slot;
    if (per_expert) {
      const Tile tile = at.channel.of_expert[size_t{home.local} * device.row_tiles + row / kTileRows];
      place = size_t{home.local} * device.capacity() + place_of(tile, row);
    }
    terms.row[term] = rows + place * device.combine_row;
    terms.weight[term] = input.weights_applied ? 1.0f : weights_of(at, dispatched)[slot];
  }
  return __popc(owns);
}

/// With one rank per node, results are what goes back to the source: one row of its node's.
DP_DEVICE void send_row(const Context& at, uint32_t row) {
  const uint32_t* first_row = at.channel.first_row;
  uint32_t node = 0;
  while (first_row[node + 1] <= row) ++node;
  if (node == at.device.node) return;
  row_is_ready(at, Operation::kCombine, node, first_row[node + 1] - first_row[node], row - first_row[node],
               first_row[node]);
}

/// Tells the ranks of the own node where their rail's results are. The place must be there before the flag,
/// so that each flag is a release of its own.
DP_DEVICE void publish_results(const Context& at) {
  const DeviceState& device = at.device;
  const Topology& topology = at.layout().topology;
  for (uint32_t source = threadIdx.x; source < device.world(); source += kThreads) {
    const uint32_t node = topology.node_of(source);
    const uint32_t holder = topology.index_of(source);
    if (node != device.node && holder == device.index) continue;  // this rank sums them itself
    const uint32_t first = at.channel.first_row[source];
    uint64_t* flag = flag_at(at, holder, at.channel.result_flags, node, device.index);
    dp::st_relaxed_sys(flag + 1, first);
    const RoundWord word{at.counters().round, at.channel.first_row[source + 1] - first};
    dp::st_release_sys(flag, word.encode());
  }
}

}  // namespace

template <ScalarType kType>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    reduce_rows(const DeviceState* __restrict__ state, uint32_t channel, bool per_expert,
                const CombineInput input) {
  DP_SHARED_ARRAY(RowList, terms, kWarps);
  DP_SHARED_ARRAY(SumStages, stages, kWarps);
  const Context at = context_of(state, channel);
  const DeviceState& device = at.device;
  const bool to_network = device.ranks_per_node() == 1 && device.nodes > 1;
  note_begin(at.clock());
  if (block_may_run(device)) {
    if (to_network && warp_in_grid() == 0) {
      submit_empty(at, Operation::kCombine, [&](uint32_t node) {
        return at.channel.first_row[node + 1] - at.channel.first_row[node];
      });
    }
    StagedReads reads(stages[warp_id()]);
    for (uint32_t row = warp_in_grid(); row < at.counters().received; row += warps_in_grid()) {
      const uint32_t count = list_results(at, input, per_expert, row, terms[warp_id()]);
      __syncwarp();
      std::byte* result = at.arena() + at.channel.results + row * device.combine_row;
      sum_rows<kType>(reads, result, terms[warp_id()], count, static_cast<uint32_t>(device.combine_row));
      __syncwarp();
      if (to_network && lane_id() == 0) send_row(at, row);
    }
  }
  if (is_last_block(at) && block_may_run(device)) {
    publish_results(at);
    note_end(at);
  }
}

void launch_combine_send(const HalfLaunch& launch, const CombineInput& input) {
  const dim3 grid(launch.num_sms);
  const dim3 block(kThreads);
  switch (launch.combine_type) {
    case ScalarType::kBfloat16:
      DP_LAUNCH(reduce_rows<ScalarType::kBfloat16>, grid, block, 0, launch.stream, launch.state,
                launch.channel, launch.per_expert, input);
      break;
    case ScalarType::kFloat16:
      DP_LAUNCH(reduce_rows<ScalarType::kFloat16>, grid, block, 0, launch.stream, launch.state,
                launch.channel, launch.per_expert, input);
      break;
    case ScalarType::kFloat32:
      DP_LAUNCH(reduce_rows<ScalarType::kFloat32>, grid, block, 0, launch.stream, launch.state,
                launch.channel, launch.per_expert, input);
      break;
  }
}

}  // namespace efa_ep::cuda
