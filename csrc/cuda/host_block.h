// What a device shares with the host through pinned memory: a block of words, then the ring of commands,
// then, if the host cannot write the device's memory, the signals.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device_ring.h"
#include "cuda/device_state.h"
#include "protocol/layout.h"
#include "protocol/limits.h"

namespace efa_ep::cuda {

struct HostBlock {
  alignas(kWordStride) uint64_t error[2] = {};           ///< DeviceError, written by kernels
  alignas(kWordStride) uint32_t stop = 0;                ///< written by the host
  alignas(kWordStride) int32_t rows[kMaxChannels] = {};  ///< received in the round, written by kernels
  alignas(kWordStride) ChannelTotals totals[kMaxChannels] = {};  ///< written by kernels
  alignas(kWordStride) ChannelTimes times[kMaxChannels] = {};    ///< written by kernels
  alignas(kWordStride) uint64_t ring_tail = 0;                   ///< written by the proxy

  static constexpr size_t ring_offset() { return align_up(sizeof(HostBlock), kWordStride); }
  static constexpr size_t signals_offset(uint32_t ring_capacity) {
    return align_up(ring_offset() + ring_capacity * sizeof(RingEntry), kSectionAlignment);
  }
  static constexpr size_t bytes(uint32_t ring_capacity, const Layout& layout) {
    return signals_offset(ring_capacity) + layout.signal_bytes();
  }
};

}  // namespace efa_ep::cuda
