// How rows get to the network: counted chunk by chunk, handed to the proxy when a chunk's last row is ready.
#pragma once

#include "cuda/kernel.cuh"
#include "protocol/chunking.h"

namespace efa_ep::cuda {

/// Takes an entry of the ring, and waits for room if it is still full. False after a fault.
DP_DEVICE bool take_entry(const Context& at, uint64_t& position) {
  const DeviceState& device = at.device;
  position = dp::atom_add_gpu(device.ring_head, 1);
  if (position - dp::ld_relaxed_gpu(device.ring_known_tail) < device.ring_capacity) return true;
  Deadline deadline(at, device.rank);
  uint64_t tail = 0;
  while (position - (tail = dp::ld_relaxed_sys(device.ring_tail)) >= device.ring_capacity) {
    if (deadline.expired()) return false;
  }
  deadline.met();
  dp::st_relaxed_gpu(device.ring_known_tail, tail);  // perhaps older than another thread's: still true
  return true;
}

/// Hands a chunk to the proxy. `local_row` is the first of all rows for the node (Command::local_row). The
/// caller has acquired the chunk's rows.
DP_DEVICE void submit(const Context& at, Operation operation, uint32_t node, const Chunking& chunking,
                      uint32_t chunk, uint32_t local_row) {
  const Immediate immediate{.round_tag = at.counters().round % Immediate::kRoundPeriod,
                            .operation = operation,
                            .channel = at.channel_index,
                            .source_node = at.device.node,
                            .first = chunk == 0,
                            .value = chunk == 0 ? chunking.rows : chunk};
  const uint32_t first = chunking.rows == 0 ? 0 : chunking.first_row(chunk);
  const Command command{.immediate = immediate.encode(),
                        .destination_node = static_cast<uint16_t>(node),
                        .local_row = local_row + first,
                        .first_row = static_cast<uint16_t>(first),
                        .rows = static_cast<uint16_t>(chunking.rows == 0 ? 0 : chunking.rows_in(chunk))};
  uint64_t position = 0;
  if (!take_entry(at, position)) return;
  dp::atom_add_gpu(&at.counters().submitted[static_cast<uint32_t>(operation)], 1);
  const uint32_t capacity = at.device.ring_capacity;
  const RingEntry entry = ring_entry(command, position, capacity);
  dp::fence_release_sys();
  dp::st_relaxed_sys_v2(&at.device.ring[position & (capacity - 1)].first, entry.first, entry.second);
}

DP_DEVICE Chunking chunking_of(const Context& at, Operation operation, uint32_t rows) {
  const uint64_t row = operation == Operation::kDispatch ? at.device.dispatch_row : at.device.combine_row;
  return Chunking::of(rows, row, at.device.chunk_bytes, at.device.rails);
}

/// A node without rows still gets its signal. Called by one warp, which starts behind its own node as all
/// ranks do, so that not all of them write to the same one at once.
template <class RowsFor>
DP_DEVICE void submit_empty(const Context& at, Operation operation, RowsFor rows_for) {
  for (uint32_t step = 1 + lane_id(); step < at.device.nodes; step += 32) {
    const uint32_t node = (at.device.node + step) % at.device.nodes;
    if (rows_for(node) == 0) submit(at, operation, node, Chunking{}, 0, 0);
  }
}

/// One thread says that row `row` of the `rows` for `node` is written, by its warp, before a __syncwarp().
/// The thread that says it of a chunk's last row hands over the chunk.
DP_DEVICE void row_is_ready(const Context& at, Operation operation, uint32_t node, uint32_t rows,
                            uint32_t row, uint32_t local_row) {
  const auto op = static_cast<uint32_t>(operation);
  const Chunking chunking = chunking_of(at, operation, rows);
  const uint32_t chunk = chunking.chunk_of(row);
  const uint32_t slot = Topology::slot_of(at.device.node, node);
  uint32_t* ready = at.channel.staged[op] + size_t{slot} * at.device.max_chunks[op] + chunk;
  if (dp::atom_add_acq_rel_gpu(ready, 1) + 1 == chunking.rows_in(chunk)) {
    submit(at, operation, node, chunking, chunk, local_row);
  }
}

/// Clears the counters of row_is_ready() for the next round. Called by a whole block.
DP_DEVICE void clear_ready_rows(const Context& at, Operation operation) {
  const auto op = static_cast<uint32_t>(operation);
  const uint32_t counters = (at.device.nodes - 1) * at.device.max_chunks[op];
  for (uint32_t i = threadIdx.x; i < counters; i += kThreads) at.channel.staged[op][i] = 0;
}

}  // namespace efa_ep::cuda
