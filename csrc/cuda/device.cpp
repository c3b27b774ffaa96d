#include "cuda/device.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <string>
#include <thread>

#include "cuda/runtime.h"
#include "errors.h"

namespace efa_ep::cuda {
namespace {

// The host looks often at first, since a round takes microseconds, and then leaves the core to others.
constexpr auto kYieldTime = std::chrono::milliseconds(2);
constexpr auto kNap = std::chrono::microseconds(50);

}  // namespace

CudaDevice::CudaDevice(const CudaDeviceOptions& options, Proxy* proxy)
    : options_(options), proxy_(proxy), stages_(options.config.layout.channels, Stage::kIdle) {
  const Topology& topology = options_.config.layout.topology;
  if (options_.arenas.size() != topology.ranks_per_node || (topology.nodes() > 1 && proxy == nullptr)) {
    throw ConfigurationError(
        "a device needs the arena of every rank of its node, and a proxy if there are several nodes");
  }
  if (!std::has_single_bit(options_.ring_capacity)) {
    throw ConfigurationError("the ring of a GPU has " + std::to_string(options_.ring_capacity) +
                             " entries; set EFA_EP_RING_COMMANDS to a power of two");
  }
}

std::vector<std::byte> CudaDevice::use_workspace(std::byte* workspace) {
  const auto on_device = [this](const void* host_address) {
    return options_.host_on_device + (static_cast<const std::byte*>(host_address) - options_.host);
  };
  const std::byte* own_arena =
      options_.arenas[options_.config.layout.topology.index_of(options_.config.rank)];
  DeviceMemory memory;
  memory.arenas = options_.arenas;
  memory.signals = options_.signals_in_arena
                       ? own_arena
                       : options_.host_on_device + HostBlock::signals_offset(options_.ring_capacity);
  memory.workspace = workspace;
  memory.ring = reinterpret_cast<RingEntry*>(options_.host_on_device + HostBlock::ring_offset());
  memory.ring_tail = reinterpret_cast<const uint64_t*>(on_device(&host().ring_tail));
  memory.ring_capacity = options_.ring_capacity;
  memory.error = reinterpret_cast<uint64_t*>(on_device(host().error));
  memory.stop = reinterpret_cast<const uint32_t*>(on_device(&host().stop));
  memory.totals = reinterpret_cast<ChannelTotals*>(on_device(host().totals));
  memory.times = reinterpret_cast<ChannelTimes*>(on_device(host().times));
  state_ = reinterpret_cast<const DeviceState*>(workspace);
  return workspace_image(options_.config, memory);
}

HalfLaunch CudaDevice::launch(uint32_t channel, Stream stream, Stage expected, Stage next, const char* call) {
  throw_if_failed();
  if (channel >= stages_.size()) {
    throw ConfigurationError("channel " + std::to_string(channel) + " does not exist; this instance has " +
                             std::to_string(stages_.size()) + " (AllToAllConfig.channels)");
  }
  if (stages_[channel] != expected) {
    throw ConfigurationError(std::string(call) + " came out of turn on channel " + std::to_string(channel) +
                             "; a round is dispatch_send, dispatch_recv, combine_send, combine_recv, and a "
                             "channel has one round in flight");
  }
  stages_[channel] = next;
  const Topology& topology = options_.config.layout.topology;
  return {.state = state_,
          .channel = channel,
          .nodes = topology.nodes(),
          .ranks_per_node = topology.ranks_per_node,
          .combine_type = options_.combine_type,
          .per_expert = options_.config.per_expert,
          .num_sms = options_.num_sms,
          .stream = stream};
}

void CudaDevice::dispatch_send(uint32_t channel, Stream stream, const DispatchInput& input) {
  if (input.tokens > options_.config.layout.max_tokens) {
    throw ConfigurationError("a rank may dispatch " + std::to_string(options_.config.layout.max_tokens) +
                             " tokens, not " + std::to_string(input.tokens) +
                             "; split the batch or raise max_tokens_per_rank");
  }
  const HalfLaunch half = launch(channel, stream, Stage::kIdle, Stage::kDispatchSent, "dispatch_send");
  DispatchInput quantised = input;
  quantised.quantisation = options_.quantisation;
  launch_dispatch_send(half, quantised);
  throw_if_launch_failed();
}

void CudaDevice::dispatch_recv(uint32_t channel, Stream stream, const DispatchOutput& output) {
  const HalfLaunch half =
      launch(channel, stream, Stage::kDispatchSent, Stage::kDispatchReceived, "dispatch_recv");
  DispatchOutput counted = output;
  const auto offset = reinterpret_cast<std::byte*>(&host().rows[channel]) - options_.host;
  counted.rows = reinterpret_cast<int32_t*>(options_.host_on_device + offset);
  launch_dispatch_recv(half, counted);
  throw_if_launch_failed();
}

void CudaDevice::combine_send(uint32_t channel, Stream stream, const CombineInput& input) {
  launch_combine_send(launch(channel, stream, Stage::kDispatchReceived, Stage::kCombineSent, "combine_send"),
                      input);
  throw_if_launch_failed();
}

void CudaDevice::combine_recv(uint32_t channel, Stream stream, std::byte* out) {
  launch_combine_recv(launch(channel, stream, Stage::kCombineSent, Stage::kIdle, "combine_recv"), out);
  throw_if_launch_failed();
}

void CudaDevice::wait(Stream stream) {
  const auto start = std::chrono::steady_clock::now();
  auto last_interrupt_check = start;
  while (!is_done(stream)) {
    const auto now = std::chrono::steady_clock::now();
    if (options_.check_interrupt && now - last_interrupt_check > kInterruptCheckTime) {
      last_interrupt_check = now;
      const auto describe = [&] {
        const double seconds = std::chrono::duration<double>(now - start).count();
        return "rank " + std::to_string(options_.config.rank) + " waited " + std::to_string(seconds) +
               " s for its GPU";
      };
      try {
        options_.check_interrupt({"dispatch_recv", 0, describe});
      } catch (...) {  // the kernels must not go on waiting for what the host has given up
        std::atomic_ref(host().stop).store(1, std::memory_order_release);
        throw;
      }
    }
    if (now - start > kYieldTime) {
      std::this_thread::sleep_for(kNap);
    } else {
      sched_yield();
    }
  }
  throw_if_failed();
}

uint32_t CudaDevice::wait_for_rows(uint32_t channel, Stream stream) {
  wait(stream);
  return static_cast<uint32_t>(std::atomic_ref(host().rows[channel]).load(std::memory_order_acquire));
}

ChannelTotals CudaDevice::totals() const {
  ChannelTotals sum;
  for (ChannelTotals& channel : host().totals) {
    for (uint64_t ChannelTotals::* const field :
         {&ChannelTotals::rounds, &ChannelTotals::tokens, &ChannelTotals::dropped_slots,
          &ChannelTotals::dropped_weight, &ChannelTotals::received_rows, &ChannelTotals::network_rows,
          &ChannelTotals::peer_rows}) {
      sum.*field += std::atomic_ref(channel.*field).load(std::memory_order_relaxed);
    }
  }
  return sum;
}

HalfTimes CudaDevice::times() const {
  const auto add = [](uint64_t& sum, uint64_t& counter) {
    sum += std::atomic_ref(counter).load(std::memory_order_relaxed);
  };
  HalfTimes sum;
  sum.waited_for_ns.resize(options_.config.layout.topology.world);
  for (ChannelTimes& channel : host().times) {
    for (size_t half = 0; half < kHalves; ++half) {
      add(sum.half_ns[half], channel.halves[half].total_ns);
      add(sum.wait_ns[half], channel.waits[half].total_ns);
      for (size_t bucket = 0; bucket < kDurationBuckets; ++bucket) {
        add(sum.half_histogram[half][bucket], channel.halves[half].samples[bucket]);
        add(sum.wait_histogram[half][bucket], channel.waits[half].samples[bucket]);
      }
    }
    for (size_t rank = 0; rank < sum.waited_for_ns.size(); ++rank) {
      add(sum.waited_for_ns[rank], channel.waited_for_ns[rank]);
    }
  }
  return sum;
}

void CudaDevice::throw_if_failed() const {
  if (proxy_ != nullptr) proxy_->throw_if_failed();
  const uint64_t first = std::atomic_ref(host().error[0]).load(std::memory_order_acquire);
  if (first != 0) throw_fault(DeviceError::decode({first, host().error[1]}), options_.config, proxy_);
}

namespace {

/// A kernel names itself if it waited for its own writes, and else one rank of which nothing came. If writes
/// to that rank are not complete either, both may stand in full queues behind writes to a third, which
/// answers nobody: it is then among those whose writes are not complete.
std::vector<uint32_t> missing_ranks(const DeviceError& error, const DeviceConfig& config, Proxy* proxy) {
  std::vector<uint32_t> unfinished;
  if (proxy != nullptr) {
    for (const uint32_t node : proxy->unfinished_destinations())
      unfinished.push_back(config.layout.topology.rail_peer(config.rank, node));
  }
  const bool for_own_writes = error.rank == config.rank && !unfinished.empty();
  const bool behind_others = std::ranges::find(unfinished, error.rank) != unfinished.end();
  return for_own_writes || behind_others ? unfinished : std::vector<uint32_t>{error.rank};
}

}  // namespace

void throw_fault(const DeviceError& error, const DeviceConfig& config, Proxy* proxy) {
  const char* half = kHalfNames[static_cast<size_t>(error.half)];
  const std::string where = std::string(half) + " of round " + std::to_string(error.round) + " on rank " +
                            std::to_string(config.rank);
  const std::string rank = "rank " + std::to_string(error.rank);
  const std::string detail = std::to_string(error.detail);
  const std::string foreign = "; a process that is not part of this run, or of an earlier one, writes here";
  switch (error.fault) {
    case Fault::kTimeout: {
      const double seconds = static_cast<double>(config.timeout_ns) * 1e-9;
      const std::vector<uint32_t> missing = missing_ranks(error, config, proxy);
      throw RankTimeoutError(where + " waited " + std::to_string(seconds) + " s for " + rank_names(missing),
                             half, error.round, missing);
    }
    case Fault::kStopped: {
      const std::vector<uint32_t> missing = missing_ranks(error, config, proxy);
      throw RankTimeoutError(where + " was ended by the host while it waited for " + rank_names(missing),
                             half, error.round, missing);
    }
    case Fault::kTooManyTokens:
      throw ConfigurationError(where + " was given " + detail + " tokens, but a rank may dispatch " +
                               std::to_string(config.layout.max_tokens) +
                               ", and no more than x has rows; correct the count or raise "
                               "max_tokens_per_rank, and build a new AllToAll");
    case Fault::kExpertId:
      throw ConfigurationError(where + " was given expert id " + detail + ", but ids are -1 (dropped) to " +
                               std::to_string(config.expert_owner.size() - 1) +
                               "; correct the routing, and build a new AllToAll");
    case Fault::kRowCount:
      throw ProtocolError(where + ": " + rank + " announces " + detail + " rows" + foreign);
    case Fault::kRowNumber:
      throw ProtocolError(where + ": the list of " + rank + " names row " + detail + foreign);
    case Fault::kRowExpert:
      throw ProtocolError(where + ": a row from " + rank + " names expert " + detail + foreign);
    case Fault::kNone:
      break;
  }
  throw ProtocolError(where + ": the device's error word " +
                      std::to_string(static_cast<uint32_t>(error.fault)) + " is unknown to the host");
}

}  // namespace efa_ep::cuda
