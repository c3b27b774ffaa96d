// How long halves take and wait. Kernels note it in the round's HalfClocks; the next round's dispatch_recv
// counts it beside its wait, where it costs nobody time, and tells the host.
#pragma once

#include "cuda/kernel.cuh"

namespace efa_ep::cuda {

/// Called by all threads of the half's first kernel, before the block's first barrier: so no wait begins
/// before its half, whichever block starts first.
DP_DEVICE void note_begin(HalfClock& clock) {
  if (threadIdx.x == 0) dp::red_max_gpu(&clock.begun_complement, ~dp::global_timer());
}
/// Called by warps of the half's last kernel when they have done their part.
DP_DEVICE void note_end(const Context& at) {
  if (lane_id() == 0) dp::red_max_gpu(&at.clock().ended, dp::global_timer());
}

DP_DEVICE void count_duration(ChannelTimes::Durations& counted, ChannelTimes::Durations& told,
                              uint64_t nanoseconds) {
  const size_t bucket = duration_bucket(nanoseconds);
  counted.total_ns += nanoseconds;
  ++counted.samples[bucket];
  dp::st_relaxed_sys(&told.total_ns, counted.total_ns);
  dp::st_relaxed_sys(&told.samples[bucket], counted.samples[bucket]);
}

/// Puts a wait down to the rank that ended it. A wait for the own proxy is nobody's.
DP_DEVICE void count_wait_for(const Context& at, LongestWait wait) {
  if (wait.nanoseconds == 0 || wait.rank == at.device.rank) return;
  uint64_t& waited = at.counters().times.waited_for_ns[wait.rank];
  waited += wait.nanoseconds;
  dp::st_relaxed_sys(&at.channel.times->waited_for_ns[wait.rank], waited);
}

/// Counts the halves of the round before the current one, a lane each. Called by one warp, once a round.
DP_DEVICE void count_last_round(const Context& at) {
  ChannelCounters& counters = at.counters();
  if (counters.round == 1) return;
  const uint32_t half = lane_id();
  LongestWait waits[kWaitingKernels] = {};
  if (half < kHalves) {
    HalfClock& clock = counters.clocks[(counters.round - 1) % 2][half];
    uint64_t waited = 0;
    for (size_t i = 0; i < kWaitingKernels; ++i) {
      waits[i] = LongestWait::decode(clock.longest_wait[i]);
      waited += waits[i].nanoseconds;
      clock.longest_wait[i] = 0;
    }
    count_duration(counters.times.halves[half], at.channel.times->halves[half],
                   clock.ended - ~clock.begun_complement);
    clock.begun_complement = 0;
    count_duration(counters.times.waits[half], at.channel.times->waits[half], waited);
  }
  for (uint32_t turn = 0; turn < kHalves; ++turn) {  // several halves may have waited for the same rank
    for (size_t i = 0; turn == half && i < kWaitingKernels; ++i) count_wait_for(at, waits[i]);
    __syncwarp();
  }
}

}  // namespace efa_ep::cuda
