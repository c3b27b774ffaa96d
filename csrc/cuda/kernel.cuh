// What all kernels share: who am I, how to wait, how to fail, how to end a kernel.
#pragma once

#include "cuda/device_error.h"
#include "cuda/device_primitives.cuh"
#include "cuda/device_state.h"
#include "cuda/halves.h"
#include "protocol/round.h"

namespace efa_ep::cuda {

// Smaller where tests have to keep the number of threads down.
#ifndef EFA_EP_WARPS_PER_BLOCK
#define EFA_EP_WARPS_PER_BLOCK 8
#endif
inline constexpr uint32_t kWarps = EFA_EP_WARPS_PER_BLOCK;
inline constexpr uint32_t kThreads = 32 * kWarps;
/// Allows 64 registers a thread. Blocks of two channels, and of the caller's kernels, then fit one SM.
inline constexpr uint32_t kBlocksPerSm = 4;
inline constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

DP_DEVICE uint32_t lane_id() { return threadIdx.x % 32; }
DP_DEVICE uint32_t warp_id() { return threadIdx.x / 32; }
DP_DEVICE uint32_t lanes_below() { return (1u << lane_id()) - 1; }
/// Warps take rows in turn, so that all of them work on the same few chunks.
DP_DEVICE uint32_t warp_in_grid() { return blockIdx.x * kWarps + warp_id(); }
DP_DEVICE uint32_t warps_in_grid() { return gridDim.x * kWarps; }

/// Where a kernel runs: the device, the channel, the half that it is part of.
struct Context {
  const DeviceState& device;
  const ChannelState& channel;
  uint32_t channel_index;
  Half half;
  uint32_t waiting_kernel = 0;  ///< which of the half's kernels that wait

  DP_DEVICE ChannelCounters& counters() const { return *channel.counters; }
  DP_DEVICE HalfClock& clock() const { return clock_of(counters().round); }
  /// Of a round: this one, the one before, or the next one once the one before is counted.
  DP_DEVICE HalfClock& clock_of(uint32_t round) const {
    return counters().clocks[round % 2][static_cast<uint32_t>(half)];
  }
  DP_DEVICE std::byte* arena() const { return device.arenas[device.index]; }
  DP_DEVICE const Layout& layout() const { return device.layout; }
};

// ---- failing -------------------------------------------------------------------------------------------

DP_DEVICE bool has_failed(const DeviceState& device) { return dp::ld_relaxed_gpu(device.failed) != 0; }

/// Asked by whole blocks when they start: threads that leave alone would be missed at the next barrier.
DP_DEVICE bool block_may_run(const DeviceState& device) {
  return !__syncthreads_or(threadIdx.x == 0 && has_failed(device));
}

/// Reports a fault, if it is the instance's first.
DP_DEVICE void fail(const Context& at, Fault fault, uint32_t rank, int64_t detail = 0) {
  if (dp::atom_cas_gpu(at.device.failed, 0, 1) != 0) return;
  const DeviceError error{.fault = fault,
                          .half = at.half,
                          .channel = at.channel_index,
                          .rank = rank,
                          .round = at.counters().round,
                          .detail = detail};
  const auto words = error.encode();
  dp::st_relaxed_sys(at.device.error + 1, words[1]);
  dp::st_release_sys(at.device.error, words[0]);
}

// ---- waiting -------------------------------------------------------------------------------------------

/// The deadline of one wait, for one thread. A wait also ends when the instance has failed elsewhere.
class Deadline {
 public:
  DP_DEVICE Deadline(const Context& at, uint32_t rank) : at_(at), rank_(rank), start_(dp::global_timer()) {}

  /// The rank to name, if it is another one now.
  DP_DEVICE void watch(uint32_t rank) { rank_ = rank; }

  /// To be asked between two looks. True if there is no point in another one.
  DP_DEVICE bool expired() {
    dp::spin_pause();
    if (++looks_ % kLooksPerCheck != 0) return false;
    if (has_failed(at_.device)) return true;
    if (dp::ld_relaxed_sys(at_.device.stop) != 0) {
      fail(at_, Fault::kStopped, rank_);
      return true;
    }
    if (dp::global_timer() - start_ <= at_.device.timeout_ns) return false;
    fail(at_, Fault::kTimeout, rank_);
    return true;
  }

  /// The wait is over: notes how long it took, if it was one.
  DP_DEVICE void met() const {
    if (looks_ == 0) return;
    const LongestWait wait{.nanoseconds = dp::global_timer() - start_, .rank = rank_};
    dp::red_max_gpu(&at_.clock().longest_wait[at_.waiting_kernel], wait.encode());
  }

 private:
  static constexpr uint32_t kLooksPerCheck = 64;  // `stop` lies beyond PCIe
  const Context& at_;
  uint32_t rank_;
  const uint64_t start_;
  uint32_t looks_ = 0;
};

/// Waits until the word at `flag` is of the current round, and acquires what was released with it. `rank` is
/// whom a fault names. False after a fault. All blocks wait for the same; the first one notes the time for
/// all, since an atomic of each would hold them up just when the rows have come.
DP_DEVICE bool wait_for_round(const Context& at, const uint64_t* flag, uint32_t rank, RoundWord& word) {
  Deadline deadline(at, rank);
  while ((word = RoundWord::decode(dp::ld_relaxed_sys(flag))).round != at.counters().round) {
    if (deadline.expired()) return false;
  }
  dp::fence_acquire_sys();
  if (blockIdx.x == 0) deadline.met();
  return true;
}

/// Waits until the network has read all rows that were handed to the proxy, so that they may be overwritten.
/// The first block notes the time.
DP_DEVICE bool wait_until_sent(const Context& at, Operation operation) {
  if (at.device.nodes == 1) return true;
  const auto op = static_cast<uint32_t>(operation);
  const auto* completed = reinterpret_cast<const uint64_t*>(at.device.signals + at.channel.completions[op]);
  Deadline deadline(at, at.device.rank);
  while (dp::ld_relaxed_sys(completed) != at.counters().submitted[op]) {
    if (deadline.expired()) return false;
  }
  dp::fence_acquire_sys();
  if (blockIdx.x == 0) deadline.met();
  return true;
}

// ---- addresses -----------------------------------------------------------------------------------------

/// The flag of rank (node, index) in the arena of the own node's rank `owner`.
DP_DEVICE uint64_t* flag_at(const Context& at, uint32_t owner, uint64_t flags, uint32_t node,
                            uint32_t index) {
  return reinterpret_cast<uint64_t*>(at.device.arenas[owner] + flags +
                                     at.layout().block(owner, node, index) * kWordStride);
}
DP_DEVICE const uint64_t* arrival_of(const Context& at, Operation operation, uint32_t node) {
  return reinterpret_cast<const uint64_t*>(
      at.device.signals + at.channel.arrivals[static_cast<uint32_t>(operation)] + node * kWordStride);
}
/// Which rows of a source on `source_node` are for `owner`, in the arena of the rank that holds the rows.
DP_DEVICE uint32_t* row_list(const Context& at, uint32_t holder, uint32_t source_node, uint32_t owner) {
  const size_t list = size_t{source_node} * at.device.ranks_per_node() + owner;
  return reinterpret_cast<uint32_t*>(at.device.arenas[holder] + at.channel.row_lists) +
         list * at.layout().max_tokens;
}
DP_DEVICE const int32_t* ids_of(const std::byte* row) {
  return reinterpret_cast<const int32_t*>(row + RowShape::ids_offset());
}
DP_DEVICE const float* weights_of(const Context& at, const std::byte* row) {
  return reinterpret_cast<const float*>(row + at.layout().row.weights_offset());
}

// ---- ends ----------------------------------------------------------------------------------------------

/// Called by all threads of all blocks at the end of their work: true in the last block, which may then read
/// what all of them have written. Assumes nothing about which blocks run at the same time.
DP_DEVICE bool is_last_block(const Context& at) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = dp::atom_add_acq_rel_gpu(&at.counters().blocks_done, 1) == gridDim.x - 1;
    if (last) dp::st_relaxed_gpu(&at.counters().blocks_done, 0);
  }
  return __syncthreads_or(last);
}

}  // namespace efa_ep::cuda
