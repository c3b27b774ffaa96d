#include "cuda_rank.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>

namespace efa_ep {
namespace {

void expect_samples(const cuda::ChannelTimes::Durations& durations, uint64_t rounds) {
  uint64_t samples = 0, least = 0, most = 0;
  for (size_t bucket = 0; bucket < kDurationBuckets; ++bucket) {
    samples += durations.samples[bucket];
    least += durations.samples[bucket] * (bucket == 0 ? 0 : duration_bound(bucket - 1));
    most += durations.samples[bucket] * duration_bound(bucket);
  }
  EXPECT_EQ(samples, rounds);
  EXPECT_GE(durations.total_ns, least);
  EXPECT_LE(durations.total_ns, most);
}

}  // namespace

bool pump(cuda::DeviceRingReader& ring, Proxy& proxy) {
  bool moved = false;
  Command command;
  while (ring.try_pop(command)) {
    simt::host_thread_checkpoint();
    while (!proxy.try_submit(command)) proxy.help();
    moved = true;
  }
  return proxy.help() || moved;
}

CudaRank::CudaRank(const WorldConfig& config, uint32_t rank, std::vector<std::byte*> arenas, Proxy* proxy,
                   const Options& options)
    : config_(config),
      rank_(rank),
      arena_(arenas.at(config.layout.topology.index_of(rank))),
      proxy_(proxy),
      options_(options),
      ring_(options.ring_capacity) {
  device_.layout = config.layout;
  device_.rank = rank;
  device_.expert_owner = config.expert_owner;
  device_.per_expert = config.per_expert;
  device_.timeout_ns = options.timeout_ns;
  if (proxy != nullptr) {
    device_.chunk_bytes = proxy->chunk_bytes();
    device_.rails = proxy->rails();
  }
  workspace_ = std::make_unique<TestMemory>(cuda::workspace_bytes(device_));
  cuda::DeviceMemory memory;
  memory.arenas = std::move(arenas);
  memory.signals = arena_;
  memory.workspace = workspace_->data();
  memory.ring = ring_.data();
  memory.ring_tail = &host_.ring_tail;
  memory.ring_capacity = options.ring_capacity;
  memory.error = host_.error;
  memory.stop = &host_.stop;
  memory.totals = host_.totals;
  memory.times = host_.times;
  const std::vector<std::byte> image = cuda::workspace_image(device_, memory);
  std::copy(image.begin(), image.end(), workspace_->data());
  register_memory();
  for (uint32_t channel = 0; channel < config.layout.channels; ++channel) {
    // Every second rank runs a kernel's blocks one after the other: none may wait for a later one.
    streams_.push_back(simt::stream_create(static_cast<int>(rank), static_cast<int>(rank % 2)));
  }
}

CudaRank::~CudaRank() { simt::unregister_ranges(static_cast<int>(rank_)); }

void CudaRank::dispatch_send(uint32_t channel, const RankRound& round) {
  Buffers& b = begin_round(channel, round);
  cuda::DispatchInput input;
  input.x_stride = round.tokens == 0 ? 0 : b.x.size() / round.tokens;
  input.x = b.x.data();
  if (config_.in_place) {
    const size_t row = config_.layout.row.payload_bytes;
    std::byte* activations = arena_ + cuda::activations(config_.layout, channel);
    then(channel, [&b, activations, row, stride = config_.layout.dispatch_row()] {
      for (uint32_t token = 0; token < b.round->tokens; ++token) {
        std::copy_n(b.x.data() + token * row, row, activations + token * stride);
      }
    });
    input.x = activations;
    input.x_stride = config_.layout.dispatch_row();
  }
  input.scales = b.scales.data();
  input.ids_are_64_bit = config_.ids_are_64_bit;
  input.ids = config_.ids_are_64_bit ? static_cast<void*>(b.wide_ids.data()) : b.narrow_ids.data();
  input.weights = b.sent_weights.data();
  input.tokens = options_.tokens_on_device ? config_.layout.max_tokens : round.tokens;
  if (options_.tokens_on_device) input.tokens_on_device = &b.tokens;
  input.quantisation = options_.quantisation;
  cuda::launch_dispatch_send(launch(channel), input);
  then(channel, [&b] {
    std::fill(b.x.begin(), b.x.end(), kUntouched);
    std::fill(b.scales.begin(), b.scales.end(), kUntouched);
    std::fill(b.wide_ids.begin(), b.wide_ids.end(), -7);
    std::fill(b.narrow_ids.begin(), b.narrow_ids.end(), -7);
    std::fill(b.sent_weights.begin(), b.sent_weights.end(), -7.0f);
    b.tokens = -7;
  });
}

void CudaRank::dispatch_recv(uint32_t channel) {
  Buffers& b = buffers(channel);
  cuda::launch_dispatch_recv(launch(channel), {.x = b.received_x.data(),
                                               .scales = b.received_scales.data(),
                                               .ids = b.ids.data(),
                                               .weights = b.weights.data(),
                                               .tokens_per_expert = b.tokens_per_expert.data(),
                                               .rows = &b.rows});
}

void CudaRank::combine_send(uint32_t channel) {
  Buffers& b = buffers(channel);
  const std::byte* rows = b.expert_rows.data();
  if (config_.in_place && !config_.per_expert && !config_.per_slot) {
    std::byte* results = arena_ + cuda::results(config_.layout, channel);
    then(channel, [&b, results] { std::copy(b.expert_rows.begin(), b.expert_rows.end(), results); });
    rows = results;
  }
  cuda::launch_combine_send(
      launch(channel),
      {.rows = rows, .per_slot = config_.per_slot, .weights_applied = config_.weights_applied});
  then(channel, [&b] { std::fill(b.expert_rows.begin(), b.expert_rows.end(), kUntouched); });
}

void CudaRank::combine_recv(uint32_t channel) {
  cuda::launch_combine_recv(launch(channel), buffers(channel).out.data());
}

void CudaRank::queue(Half half, uint32_t channel, const RankRound& round) {
  switch (half) {
    case Half::kDispatchSend:
      return dispatch_send(channel, round);
    case Half::kDispatchRecv:
      return dispatch_recv(channel);
    case Half::kCombineSend:
      return combine_send(channel);
    case Half::kCombineRecv:
      return combine_recv(channel);
  }
}

void CudaRank::then(uint32_t channel, std::function<void()> action) {
  simt::launch_raw(streams_[channel], dim3(1), dim3(1), std::move(action), "caller");
}

void CudaRank::sync() {
  for (const simt::stream_t stream : streams_) simt::stream_sync(stream);
}

void CudaRank::check() {
  const Layout& layout = config_.layout;
  for (const Buffers& got : rounds_) {
    const testing::ScopedTrace where(__FILE__, __LINE__,
                                     testing::Message() << "rank " << rank_ << ", channel " << got.channel);
    const RankRound& want = *got.round;
    EXPECT_EQ(got.rows, static_cast<int32_t>(want.rows));
    EXPECT_EQ(got.tokens_per_expert, want.tokens_per_expert);
    EXPECT_EQ(got.ids, want.received_ids);
    EXPECT_EQ(got.weights, want.received_weights);
    expect_rows("x", got.received_x, want.received_x, layout.row.payload_bytes);
    expect_rows("scales", got.received_scales, want.received_scales, layout.row.scale_bytes);
    expect_rows("out", got.out, want.out, layout.row.combine_bytes);
    ++counted_.rounds;
    ++rounds_of_[got.channel];
    counted_.tokens += want.tokens;
    counted_.received_rows += want.rows;
    counted_.network_rows += want.network_rows;
    counted_.peer_rows += want.peer_rows;
  }
  rounds_.clear();
  check_totals();
  for (uint32_t channel = 0; channel < layout.channels; ++channel) check_times(channel);
}

bool CudaRank::pump() { return proxy_ != nullptr && efa_ep::pump(reader_, *proxy_); }

cuda::DeviceError CudaRank::error() const {
  const uint64_t first = std::atomic_ref(host_.error[0]).load(std::memory_order_acquire);
  return cuda::DeviceError::decode({first, host_.error[1]});
}

void CudaRank::throw_if_failed() const {
  if (proxy_ != nullptr) proxy_->throw_if_failed();
  if (error().fault != cuda::Fault::kNone) cuda::throw_fault(error(), device_, proxy_);
}

CudaRank::Buffers& CudaRank::begin_round(uint32_t channel, const RankRound& round) {
  Buffers& b = rounds_.emplace_back();
  b.channel = channel;
  b.round = &round;
  b.tokens = static_cast<int32_t>(round.tokens);
  b.x = round.x;
  b.scales = round.scales;
  b.wide_ids = round.ids;
  b.narrow_ids.assign(round.ids.begin(), round.ids.end());
  b.sent_weights = round.weights;
  b.received_x.assign(round.received_x.size(), kUntouched);
  b.received_scales.assign(round.received_scales.size(), kUntouched);
  b.ids.assign(round.received_ids.size(), -7);
  b.weights.assign(round.received_weights.size(), -7.0f);
  b.tokens_per_expert.assign(round.tokens_per_expert.size(), -7);
  b.expert_rows = round.expert_rows;
  b.out.assign(round.out.size(), kUntouched);
  return b;
}

CudaRank::Buffers& CudaRank::buffers(uint32_t channel) {
  return *std::find_if(rounds_.rbegin(), rounds_.rend(),
                       [&](const Buffers& buffers) { return buffers.channel == channel; });
}

cuda::HalfLaunch CudaRank::launch(uint32_t channel) const {
  return {.state = reinterpret_cast<const cuda::DeviceState*>(workspace_->data()),
          .channel = channel,
          .nodes = config_.layout.topology.nodes(),
          .ranks_per_node = config_.layout.topology.ranks_per_node,
          .combine_type = config_.combine_type,
          .per_expert = config_.per_expert,
          .num_sms = options_.num_sms,
          .stream = reinterpret_cast<cuda::Stream>(streams_[channel])};
}

void CudaRank::register_memory() {
  const auto device = static_cast<int>(rank_);
  simt::register_range(workspace_->data(), workspace_->bytes(), simt::MemoryKind::device, device);
  const Layout& layout = config_.layout;
  // What the proxy and the ranks of the node write, and kernels of this rank wait for
  simt::register_range(arena_, layout.signal_bytes(), simt::MemoryKind::written_by_others, device);
  for (uint32_t channel = 0; channel < layout.channels; ++channel) {
    const size_t flags = layout.section_offset(channel, Section::kDispatchFlags);
    simt::register_range(arena_ + flags, layout.section_offset(channel, Section::kRowLists) - flags,
                         simt::MemoryKind::written_by_others, device);
  }
  simt::register_range(arena_, layout.total_bytes(), simt::MemoryKind::device, device);
  simt::register_range(&host_, sizeof host_, simt::MemoryKind::host, device);
  simt::register_range(ring_.data(), ring_.size() * sizeof(cuda::RingEntry), simt::MemoryKind::host, device);
}

void CudaRank::check_totals() const {
  cuda::ChannelTotals told;
  for (const cuda::ChannelTotals& channel : host_.totals) {
    told.rounds += channel.rounds;
    told.tokens += channel.tokens;
    told.received_rows += channel.received_rows;
    told.network_rows += channel.network_rows;
    told.peer_rows += channel.peer_rows;
  }
  EXPECT_EQ(told.rounds, counted_.rounds);
  EXPECT_EQ(told.tokens, counted_.tokens);
  EXPECT_EQ(told.received_rows, counted_.received_rows);
  EXPECT_EQ(told.network_rows, counted_.network_rows);
  EXPECT_EQ(told.peer_rows, counted_.peer_rows);
}

void CudaRank::check_times(uint32_t channel) const {
  const cuda::ChannelTimes& times = host_.times[channel];
  const uint64_t rounds = rounds_of_[channel];
  uint64_t waits = 0;
  for (size_t half = 0; half < kHalves; ++half) {
    const testing::ScopedTrace where(
        __FILE__, __LINE__,
        testing::Message() << "rank " << rank_ << ", channel " << channel << ", " << kHalfNames[half]);
    expect_samples(times.halves[half], rounds == 0 ? 0 : rounds - 1);
    expect_samples(times.waits[half], rounds == 0 ? 0 : rounds - 1);
    EXPECT_LE(times.waits[half].total_ns, times.halves[half].total_ns);
    EXPECT_EQ(times.halves[half].total_ns > 0, rounds > 1);
    waits += times.waits[half].total_ns;
  }
  uint64_t for_others = 0;
  for (const uint64_t waited : times.waited_for_ns) for_others += waited;
  EXPECT_LE(for_others, waits);
  EXPECT_EQ(times.waited_for_ns[rank_], 0u);
}

}  // namespace efa_ep
