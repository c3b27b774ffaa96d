#include "testing/emulated_world.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <numeric>
#include <utility>

namespace efa_ep {
namespace {

// Large zeroed allocations cost no memory before they are written.
std::byte* allocate_zeroed(size_t bytes) {
  auto* memory = static_cast<std::byte*>(std::calloc(bytes, 1));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

uint64_t arrivals(const Proxy* proxy) { return proxy == nullptr ? 0 : proxy->counters().immediates; }

/// A stand-in's: no tokens, no experts.
class NoWorkload final : public EmulatedWorkload {
 public:
  DispatchInput tokens(const EmulatedTurn&) override { return {}; }
  DispatchOutput receive(const EmulatedTurn&, uint32_t) override { return {}; }
  CombineInput results(const EmulatedTurn&) override { return {}; }
  std::byte* output(const EmulatedTurn&) override { return nullptr; }
  void finished(const EmulatedTurn&) override {}
};

}  // namespace

template <class Work>
void EmulatedWorld::guard(uint32_t rank, const Work& work) {
  try {
    work();
  } catch (...) {  // whatever it is, the owner of the world looks at it
    ranks_[rank].error = std::current_exception();
  }
}

EmulatedWorld::EmulatedWorld(const EmulatedWorldOptions& options)
    : options_(options),
      network_(options.network),
      random_(options.network.seed),
      ranks_(options.layout.topology.world),
      server_of_(ranks_.size()) {
  std::iota(server_of_.begin(), server_of_.end(), 0);
  build();
}

void EmulatedWorld::mask(std::vector<uint32_t> server_of) {
  server_of_ = std::move(server_of);
  for (Rank& rank : ranks_) rank.stands_in_for.clear();
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    if (is_stand_in(rank)) ranks_.at(server_of_[rank]).stands_in_for.push_back(rank);
  }
  for (Rank& rank : ranks_) {
    // In this order: each needs the next.
    rank.device.reset();
    rank.proxy.reset();
    rank.policy.reset();
    rank.fabric.reset();
    rank.arena.reset();
    rank.error = nullptr;
    rank.queued = false;
    rank.received_rows = 0;
    for (Channel& channel : rank.channels) {
      channel.half = Half::kDispatchSend;
      channel.finished = channel.last;  // rounds in flight are lost
    }
  }
  queue_.clear();
  build();
}

void EmulatedWorld::build() {
  const uint32_t world = options_.layout.topology.world;
  // Guests last, since they share the NICs of others.
  for (const bool guests : {false, true}) {
    for (uint32_t rank = 0; rank < world; ++rank) {
      if (is_guest(rank) == guests) open(rank);
    }
  }
  for (uint32_t rank = 0; rank < world; ++rank) connect(rank);
  for (uint32_t rank = 0; rank < world; ++rank) make_device(rank);
}

void EmulatedWorld::open(uint32_t rank) {
  const size_t bytes = options_.layout.total_bytes();
  const auto nics_of = is_guest(rank) ? std::optional(server_of_[rank]) : std::nullopt;
  ranks_[rank].arena.reset(allocate_zeroed(bytes));
  ranks_[rank].fabric = std::make_unique<EmulatedFabric>(network_, rank, nics_of);
  ranks_[rank].fabric->register_memory(ranks_[rank].arena.get(), bytes);
  ranks_[rank].channels.resize(options_.layout.channels);
}

void EmulatedWorld::connect(uint32_t rank) {
  const Topology& topology = options_.layout.topology;
  for (uint32_t node = 0; node < topology.nodes(); ++node) {
    const uint32_t peer = topology.rail_peer(rank, node);
    if (peer != rank) ranks_[rank].fabric->connect(peer, ranks_[peer].fabric->address());
  }
}

void EmulatedWorld::make_device(uint32_t index) {
  Rank& rank = ranks_[index];
  const Topology& topology = options_.layout.topology;
  rank.clock.use(network_.clock());
  if (topology.nodes() > 1) {
    rank.policy = SignalPolicy::create(options_.signal_policy, *rank.fabric, network_.clock());
    // Without a thread of its own, the proxy posts in the moment a half submits, at no virtual time.
    rank.proxy = std::make_unique<Proxy>(*rank.policy, rank.arena.get(),
                                         ProxyOptions{.layout = options_.layout,
                                                      .rank = index,
                                                      .chunk_bytes = options_.chunk_bytes,
                                                      .ring_commands = options_.ring_commands,
                                                      .timeout = options_.timeout,
                                                      .clock = &network_.clock(),
                                                      .own_core = false},
                                         false);
  }
  std::vector<std::byte*> arenas;
  for (uint32_t local = 0; local < topology.ranks_per_node; ++local) {
    arenas.push_back(ranks_[topology.rank_at(topology.node_of(index), local)].arena.get());
  }
  CpuDeviceOptions device;
  device.layout = options_.layout;
  device.rank = index;
  device.expert_owner = options_.expert_owner;
  for (uint32_t& owner : device.expert_owner) {
    if (is_stand_in(owner)) owner = kNoOwner;
  }
  device.combine_type = options_.combine_type;
  device.per_expert = options_.per_expert;
  device.timeout = options_.timeout;
  device.clock = &rank.clock;
  rank.device = std::make_unique<CpuDevice>(device, arenas, rank.proxy.get());
}

void EmulatedWorld::inject_before(Half half, const EmulatedTurn& turn, const Fault& fault) {
  faults_.push_back({half, turn, fault});
}

void EmulatedWorld::run(EmulatedWorkload& workload, uint32_t rounds) {
  workload_ = &workload;
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    for (Channel& channel : ranks_[rank].channels) {
      channel.last += rounds;
      channel.since = network_.now();
    }
    enqueue(rank);
  }
  while (true) {
    while (!queue_.empty()) step(take_queued());
    const bool woken = network_.advance_until_woken(no_deadline_before_);
    for (const uint32_t rank : network_.take_woken()) enqueue(rank);
    if (woken) continue;
    const auto deadline = earliest_deadline();
    if (deadline > std::exchange(no_deadline_before_, deadline)) continue;
    if (deadline == EmulatedNetwork::kForEver) return;
    network_.advance_to(deadline);
    expire();
  }
}

void EmulatedWorld::enqueue(uint32_t rank) {
  if (std::exchange(ranks_[rank].queued, true)) return;
  queue_.push_back(rank);
}

uint32_t EmulatedWorld::take_queued() {
  std::swap(queue_[random_() % queue_.size()], queue_.back());
  const uint32_t rank = queue_.back();
  queue_.pop_back();
  ranks_[rank].queued = false;
  return rank;
}

// One half at most on each channel, so that the others may overtake this rank anywhere.
void EmulatedWorld::step(uint32_t index) {
  Rank& rank = ranks_[index];
  if (rank.error || !network_.alive(index) || network_.frozen(index)) return;
  no_deadline_before_ = std::min(no_deadline_before_, deadline_of(index));
  const uint64_t arrived = arrivals(rank.proxy.get());
  while (rank.proxy && rank.proxy->help()) continue;
  // What arrived here, or what this rank did, may be what a rank of its node waits for. That its own writes
  // are complete is no news to others.
  bool news = arrivals(rank.proxy.get()) != arrived;
  guard(index, [&] {
    if (rank.proxy) rank.proxy->throw_if_failed();
    for (uint32_t channel = 0; channel < rank.channels.size(); ++channel) {
      news |= advance_channel(index, channel);
    }
  });
  if (!news) return;
  const Topology& topology = options_.layout.topology;
  for (uint32_t local = 0; local < topology.ranks_per_node; ++local) {
    enqueue(topology.rank_at(topology.node_of(index), local));
  }
  for (const uint32_t served : rank.stands_in_for) enqueue(served);
}

bool EmulatedWorld::advance_channel(uint32_t index, uint32_t channel_index) {
  const Channel& channel = ranks_[index].channels[channel_index];
  if (!is_running(index, channel)) return false;
  inject_due(turn_of(index, channel_index), channel.half);
  if (!is_running(index, channel) || !may_finish(index, channel_index)) return false;
  finish_half(index, channel_index);
  return true;
}

// Whether the next half would not wait.
bool EmulatedWorld::may_finish(uint32_t index, uint32_t channel_index) {
  Rank& rank = ranks_[index];
  switch (rank.channels[channel_index].half) {
    case Half::kDispatchSend:
      return may_begin(index, channel_index);
    case Half::kCombineSend:
      return true;
    case Half::kDispatchRecv:
      return rank.device->dispatch_ready(channel_index);
    case Half::kCombineRecv:
      return rank.device->combine_ready(channel_index);
  }
  return false;
}

// A stand-in begins a round when the rank that serves it has.
bool EmulatedWorld::may_begin(uint32_t index, uint32_t channel_index) const {
  if (!is_stand_in(index)) return true;
  const Channel& own = ranks_[index].channels[channel_index];
  const Channel& server = ranks_[server_of_[index]].channels[channel_index];
  return server.finished > own.finished || server.half != Half::kDispatchSend;
}

void EmulatedWorld::finish_half(uint32_t index, uint32_t channel_index) {
  Rank& rank = ranks_[index];
  Channel& channel = rank.channels[channel_index];
  CpuDevice& device = *rank.device;
  const EmulatedTurn turn = turn_of(index, channel_index);
  NoWorkload no_workload;
  EmulatedWorkload& workload = is_stand_in(index) ? no_workload : *workload_;
  switch (channel.half) {
    case Half::kDispatchSend:
      device.dispatch_send(channel_index, workload.tokens(turn));
      channel.half = Half::kDispatchRecv;
      break;
    case Half::kDispatchRecv: {
      const uint64_t before = std::exchange(rank.received_rows, device.counters().received_rows);
      const auto rows = static_cast<uint32_t>(rank.received_rows - before);
      device.dispatch_pack(channel_index, workload.receive(turn, rows));
      channel.half = Half::kCombineSend;
      break;
    }
    case Half::kCombineSend:
      device.combine_send(channel_index, workload.results(turn));
      channel.half = Half::kCombineRecv;
      break;
    case Half::kCombineRecv:
      device.combine_recv(channel_index, workload.output(turn));
      workload.finished(turn);
      channel.half = Half::kDispatchSend;
      ++channel.finished;
      break;
  }
  channel.since = network_.now();
}

void EmulatedWorld::inject_due(const EmulatedTurn& turn, Half half) {
  const auto is_due = [&](const HalfFault& fault) {
    return fault.half == half && fault.turn.rank == turn.rank && fault.turn.channel == turn.channel &&
           fault.turn.round == turn.round;
  };
  for (const HalfFault& fault : faults_) {
    if (is_due(fault)) network_.inject(fault.fault);
  }
  std::erase_if(faults_, is_due);
}

// Whether it can be waited for: its next half belongs to a round that is to be run.
bool EmulatedWorld::is_running(uint32_t index, const Channel& channel) const {
  return !ranks_[index].error && channel.finished < channel.last && network_.alive(index) &&
         !network_.frozen(index);
}

std::chrono::nanoseconds EmulatedWorld::deadline_of(uint32_t rank) const {
  auto earliest = EmulatedNetwork::kForEver;
  for (const Channel& channel : ranks_[rank].channels) {
    if (is_running(rank, channel)) earliest = std::min(earliest, channel.since + options_.timeout);
  }
  return earliest;
}

std::chrono::nanoseconds EmulatedWorld::earliest_deadline() const {
  auto earliest = EmulatedNetwork::kForEver;
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) earliest = std::min(earliest, deadline_of(rank));
  return earliest;
}

// Halves whose time is over: their devices say whom they wait for.
void EmulatedWorld::expire() {
  for (uint32_t index = 0; index < ranks_.size(); ++index) {
    for (uint32_t channel_index = 0; channel_index < ranks_[index].channels.size(); ++channel_index) {
      const Channel& channel = ranks_[index].channels[channel_index];
      if (!is_running(index, channel) || channel.since + options_.timeout > network_.now()) continue;
      guard(index, [&] {
        // The receiving half's check that does not wait has just failed; the one that waits names names.
        ranks_[index].clock.begin(channel.since);
        if (channel.half == Half::kDispatchRecv) ranks_[index].device->dispatch_wait(channel_index);
        finish_half(index, channel_index);
      });
      enqueue(index);
    }
  }
}

}  // namespace efa_ep
