// One rank of a world whose halves are the CUDA kernels, run by the engine. Everything else is the world's:
// arena, proxy, network. Halves are only queued; check() compares what they wrote, once their streams have
// been waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/device.h"
#include "cuda/device.h"
#include "cuda/device_error.h"
#include "cuda/halves.h"
#include "engine/simt.h"
#include "proxy/proxy.h"
#include "world_plan.h"

namespace efa_ep {

/// Moves chunks from a device's ring to its proxy, and does a piece of that one's work. Returns whether
/// anything moved. One thread at a time.
bool pump(cuda::DeviceRingReader& ring, Proxy& proxy);

class CudaRank {
 public:
  struct Options {
    uint32_t num_sms = 2;
    uint32_t ring_capacity = 64;
    uint64_t timeout_ns = 60'000'000'000;
    bool tokens_on_device = false;
    Quantisation quantisation = Quantisation::kNone;
  };

  /// `arenas` are those of the node's ranks, in order; `proxy` is null if the world has one node. Both
  /// outlive the rank, and so does `config`.
  CudaRank(const WorldConfig& config, uint32_t rank, std::vector<std::byte*> arenas, Proxy* proxy,
           const Options& options);
  ~CudaRank();
  CudaRank(const CudaRank&) = delete;
  CudaRank& operator=(const CudaRank&) = delete;

  // The four halves, queued. Inputs are overwritten as soon as a half has ended, or lie where the device
  // wants them; outputs lie in memory of exactly their size.

  void dispatch_send(uint32_t channel, const RankRound& round);
  void dispatch_recv(uint32_t channel);
  void combine_send(uint32_t channel);
  void combine_recv(uint32_t channel);
  void queue(Half half, uint32_t channel, const RankRound& round);

  /// Something that happens in stream order, as a kernel of the caller would.
  void then(uint32_t channel, std::function<void()> action);
  void sync();
  /// Compares every round since the last check with its plan, bit for bit.
  void check();

  /// Called by the world's network thread only.
  bool pump();

  cuda::DeviceError error() const;
  /// Throws what a caller of the product would get: the proxy's failure, or the kernels'.
  void throw_if_failed() const;
  /// What its kernels have said of time.
  const cuda::ChannelTimes& times(uint32_t channel) const { return host_.times[channel]; }
  /// Ends all waits of its kernels.
  void stop() { std::atomic_ref(host_.stop).store(1, std::memory_order_relaxed); }

 private:
  struct Buffers {
    uint32_t channel;
    const RankRound* round;
    int32_t tokens;
    Bytes x, scales;
    std::vector<int64_t> wide_ids;
    std::vector<int32_t> narrow_ids;
    std::vector<float> sent_weights;
    Bytes received_x, received_scales;
    std::vector<int32_t> ids;
    std::vector<float> weights;
    std::vector<int32_t> tokens_per_expert;
    int32_t rows = -7;
    Bytes expert_rows;
    Bytes out;
  };
  /// What would be pinned host memory.
  struct HostWords {
    alignas(64) uint64_t ring_tail = 0;
    alignas(64) mutable uint64_t error[2] = {};
    alignas(64) uint32_t stop = 0;
    alignas(64) cuda::ChannelTotals totals[kMaxChannels] = {};
    alignas(64) cuda::ChannelTimes times[kMaxChannels] = {};
  };

  Buffers& begin_round(uint32_t channel, const RankRound& round);
  /// Of the channel's newest round.
  Buffers& buffers(uint32_t channel);
  cuda::HalfLaunch launch(uint32_t channel) const;
  /// Tells the engine who owns what, so that it can check scopes.
  void register_memory();
  void check_totals() const;
  /// All rounds but the newest have a sample of every half, and it waited for no longer than it took.
  void check_times(uint32_t channel) const;

  const WorldConfig& config_;
  const uint32_t rank_;
  std::byte* const arena_;
  Proxy* const proxy_;
  const Options options_;
  cuda::DeviceConfig device_;
  std::unique_ptr<TestMemory> workspace_;
  std::vector<cuda::RingEntry> ring_;
  HostWords host_;
  cuda::DeviceRingReader reader_{ring_.data(), &host_.ring_tail, &host_.stop, options_.ring_capacity};
  std::vector<simt::stream_t> streams_;
  std::deque<Buffers> rounds_;
  cuda::ChannelTotals counted_;  // in all rounds that were checked
  uint64_t rounds_of_[kMaxChannels] = {};
};

}  // namespace efa_ep
