#include "cpu/device.h"

#include <sched.h>

#include <string>
#include <thread>
#include <utility>

#include "errors.h"
#include "protocol/chunking.h"

namespace efa_ep {
namespace {

// A wait yields first, since the next event is usually microseconds away and often on this very core; a long
// one naps, so that an idle rank leaves the core to others.
constexpr auto kYieldTime = std::chrono::milliseconds(2);
constexpr auto kNap = std::chrono::microseconds(50);
constexpr uint32_t kTurnsPerClockCheck = 16;

}  // namespace

CpuDevice::CpuDevice(const CpuDeviceOptions& options, std::vector<std::byte*> arenas, Proxy* proxy)
    : options_(options),
      layout_(options_.layout),
      topology_(options.layout.topology),
      node_(topology_.node_of(options.rank)),
      index_(topology_.index_of(options.rank)),
      placement_(options.expert_owner, topology_.world),
      local_experts_(placement_.hosted_by(options.rank)),
      arenas_(std::move(arenas)),
      proxy_(proxy),
      channels_(layout_.channels) {
  counters_.waited_for_ns = std::vector<std::atomic<uint64_t>>(topology_.world);
  if (arenas_.size() != topology_.ranks_per_node || (topology_.nodes() > 1 && proxy_ == nullptr)) {
    throw ConfigurationError("rank " + std::to_string(options.rank) + " got " +
                             std::to_string(arenas_.size()) + " arenas and " +
                             (proxy_ == nullptr ? "no" : "a") + " proxy; a device needs the arenas of all " +
                             std::to_string(topology_.ranks_per_node) +
                             " ranks of its node, and a proxy if there are several nodes");
  }
  for (uint32_t expert = 0; expert < placement_.experts(); ++expert) {
    const uint32_t owner = placement_.owner(static_cast<int32_t>(expert));
    destination_of_expert_.push_back(owner == kNoOwner ? kNoOwner : destination_of(owner));
  }
  for (uint32_t channel_index = 0; channel_index < channels_.size(); ++channel_index) {
    Channel& channel = channels_[channel_index];
    channel.destinations.resize(topology_.nodes() + topology_.ranks_per_node);
    channel.slot_rows.resize(topology_.nodes());
    channel.listed.resize(topology_.world);
    channel.summed.resize(topology_.nodes());
    channel.trace = TraceBuffer(options_.trace_spans);
    for (uint32_t rank = 0; rank < topology_.world; ++rank) {
      const uint32_t node = topology_.node_of(rank);
      Source source;
      source.rank = rank;
      source.holder = topology_.index_of(rank);
      source.section = node == node_ ? layout_.outgoing(channel_index, Operation::kDispatch)
                                     : layout_.slot(channel_index, Operation::kDispatch, node_, node);
      channel.sources.push_back(std::move(source));
    }
  }
}

DeviceCounters CpuDevice::counters() const {
  return {counters_.rounds,        counters_.tokens,        counters_.network_rows,  counters_.peer_rows,
          counters_.received_rows, counters_.dropped_slots, counters_.dropped_weight};
}

HalfTimes CpuDevice::times() const {
  HalfTimes times;
  for (size_t half = 0; half < kHalves; ++half) {
    times.half_ns[half] = counters_.half_ns[half];
    times.wait_ns[half] = counters_.wait_ns[half];
    times.half_histogram[half] = counters_.half_histogram[half].counts();
    times.wait_histogram[half] = counters_.wait_histogram[half].counts();
  }
  times.waited_for_ns.assign(counters_.waited_for_ns.begin(), counters_.waited_for_ns.end());
  return times;
}

std::vector<TraceSpan> CpuDevice::trace() const {
  std::vector<TraceSpan> spans;
  for (const Channel& channel : channels_) {
    const std::vector<TraceSpan> more = channel.trace.spans();
    spans.insert(spans.end(), more.begin(), more.end());
  }
  return spans;
}

uint64_t CpuDevice::dropped_spans() const {
  uint64_t dropped = 0;
  for (const Channel& channel : channels_) dropped += channel.trace.dropped();
  return dropped;
}

// At the end of a round, so that a half that is timed in two pieces is one sample.
void CpuDevice::record_round(Channel& channel) {
  for (size_t half = 0; half < kHalves; ++half) {
    counters_.half_histogram[half].record(channel.half_ns[half]);
    counters_.wait_histogram[half].record(channel.wait_ns[half]);
  }
  channel.half_ns.fill(0);
  channel.wait_ns.fill(0);
}

void CpuDevice::require(uint32_t channel_index, Stage stage, const char* call) const {
  if (channel_index >= channels_.size()) {
    throw ConfigurationError("channel " + std::to_string(channel_index) +
                             " does not exist; this instance has " + std::to_string(channels_.size()) +
                             " (AllToAllConfig.channels)");
  }
  if (channels_[channel_index].stage != stage) {
    throw ConfigurationError(
        std::string(call) + " came out of turn on channel " + std::to_string(channel_index) +
        "; a round is dispatch_send, dispatch_recv, combine_send, combine_recv, and a channel "
        "has one round in flight");
  }
  if (proxy_ != nullptr) proxy_->throw_if_failed();
}

// Makes rows 0 to rows-1, chunk by chunk, with `make_rows`, which returns where the first of them is
// (Command::local_row), and hands each chunk over at once.
void CpuDevice::post_rows(uint32_t channel_index, Operation operation, uint32_t node, uint32_t rows,
                          const std::function<uint32_t(uint32_t, uint32_t)>& make_rows) {
  Channel& channel = channels_[channel_index];
  const Chunking chunking =
      Chunking::of(rows, layout_.row_bytes(operation), proxy_->chunk_bytes(), proxy_->rails());
  for (uint32_t chunk = 0; chunk < chunking.chunks; ++chunk) {
    const uint32_t first = chunking.first_row(chunk);
    const uint32_t count = chunking.rows_in(chunk);
    const uint32_t local_row = make_rows(first, count);
    const Immediate immediate{.round_tag = channel.round % Immediate::kRoundPeriod,
                              .operation = operation,
                              .channel = channel_index,
                              .source_node = node_,
                              .first = chunk == 0,
                              .value = chunk == 0 ? rows : chunk};
    const Command command{.immediate = immediate.encode(),
                          .destination_node = static_cast<uint16_t>(node),
                          .local_row = local_row,
                          .first_row = static_cast<uint16_t>(first),
                          .rows = static_cast<uint16_t>(count)};
    if (!proxy_->try_submit(command)) {
      const uint32_t peer = topology_.rail_peer(options_.rank, node);
      channel.missing = peer;
      wait(channel, [&] { return proxy_->try_submit(command); }, [&] { return std::vector<uint32_t>{peer}; });
    }
    ++channel.submitted[static_cast<size_t>(operation)];
  }
  counters_.network_rows += rows;
}

// Whether all writes of an operation are complete, so that the rows they came from may be overwritten.
bool CpuDevice::sent(uint32_t channel_index, Operation operation) const {
  if (topology_.nodes() == 1) return true;
  return word(own_arena(), layout_.completion(channel_index, operation)).load(std::memory_order_acquire) ==
         channels_[channel_index].submitted[static_cast<size_t>(operation)];
}

std::vector<uint32_t> CpuDevice::unfinished_peers() const {
  if (proxy_ == nullptr) return {};
  std::vector<uint32_t> ranks;
  for (const uint32_t node : proxy_->unfinished_destinations()) {
    ranks.push_back(topology_.rail_peer(options_.rank, node));
  }
  return ranks;
}

// Every wait of the device: does the proxy's work meanwhile, and ends with an error at the deadline. Its time
// is put down to the rank that was missing last. A wait for room in the ring may be part of another,
// which then has its time.
void CpuDevice::wait(Channel& channel, const std::function<bool()>& ready,
                     const std::function<std::vector<uint32_t>()>& missing) {
  if (ready()) return;
  const uint32_t round = channel.round;
  const auto half = static_cast<size_t>(channel.half);
  const WaitScope scope(channel);
  std::optional<ScopedTimer> timer;
  if (scope.outermost) {
    timer.emplace(counters_.wait_ns[half], channel.wait_ns[half], channel.trace,
                  span_of(TraceSpan::Kind::kWait, channel.half, channel));
  }
  const Proxy::Waiting waiting(proxy_);
  const auto start = options_.clock->now();
  auto last_interrupt_check = start;
  const auto describe = [&](const std::vector<uint32_t>& ranks) {
    const double seconds = std::chrono::duration<double>(options_.clock->now() - start).count();
    return std::string(kHalfNames[half]) + " of round " + std::to_string(round) + " on rank " +
           std::to_string(options_.rank) + " waited " + std::to_string(seconds) + " s for " +
           rank_names(ranks);
  };
  const auto over = [&] {
    if (!ready()) return false;
    if (!timer) return true;
    timer->span().peer = channel.missing;
    if (channel.missing != kNobody) {
      const std::chrono::nanoseconds waited = options_.clock->now() - start;
      counters_.waited_for_ns[channel.missing] += static_cast<uint64_t>(waited.count());
    }
    return true;
  };
  for (uint32_t turn = 1;; ++turn) {
    const bool moved = proxy_ != nullptr && proxy_->help();
    if (over()) return;
    bool nap = false;
    // Also while something moves: it may be another channel's, and this wait has a deadline of its own.
    if (turn % kTurnsPerClockCheck == 0) {
      if (proxy_ != nullptr) proxy_->throw_if_failed();
      const auto now = options_.clock->now();
      if (now - start >= options_.timeout) {
        const std::vector<uint32_t> ranks = missing();
        if (ranks.empty() && over()) return;  // the last of it came between the two looks
        throw RankTimeoutError(describe(ranks), kHalfNames[half], round, ranks);
      }
      if (options_.check_interrupt && now - last_interrupt_check > kInterruptCheckTime) {
        last_interrupt_check = now;
        options_.check_interrupt({kHalfNames[half], round, [&] { return describe(missing()); }});
      }
      nap = now - start > kYieldTime;
    }
    if (moved) continue;
    if (nap) {
      std::this_thread::sleep_for(kNap);
    } else {
      sched_yield();
    }
  }
}

OwnerList CpuDevice::owners_of(const RowIds& ids) const {
  OwnerList owners;
  for (const int32_t id : ids) {
    if (id < 0) continue;
    const uint32_t rank = placement_.owner(id);
    if (rank == kNoOwner) {
      throw ProtocolError("a received row names expert " + std::to_string(id) +
                          ", which no live rank has; its sender's mask differs from this rank's");
    }
    if (topology_.node_of(rank) == node_) owners.insert(topology_.index_of(rank));
  }
  return owners;
}

}  // namespace efa_ep
