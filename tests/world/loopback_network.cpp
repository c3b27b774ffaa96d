#include "loopback_network.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "errors.h"

namespace efa_ep {
namespace {

template <class T>
T take(std::vector<T>& from, size_t index) {
  std::swap(from[index], from.back());
  T taken = std::move(from.back());
  from.pop_back();
  return taken;
}

}  // namespace

struct LoopbackNetwork::Event {
  Completion completion;
  uint32_t rail, peer;
};

struct LoopbackNetwork::Endpoint final : Fabric {
  Endpoint(LoopbackNetwork& network, uint32_t rank, const Options& options)
      : network(network), rank(rank), in_flight(options.rails), unpolled(options.rails) {
    traffic.outstanding.resize(options.ranks);
    traffic.most_outstanding.resize(options.ranks);
  }
  const FabricDescription& description() const override { return network.description_; }
  void register_memory(std::byte* base, size_t bytes) override { memory = {base, bytes}; }
  std::vector<std::byte> address() const override { return {std::byte(rank)}; }
  void connect(uint32_t peer, std::span<const std::byte> address) override {
    if (address.size() != 1 || address[0] != std::byte(peer)) throw ProtocolError("not a loopback address");
    const std::lock_guard lock(network.mutex_);
    peers.insert(peer);
  }
  PostResult post_write(const WriteRequest& request) override { return network.post(*this, request); }
  size_t poll(std::span<Completion> completions) override { return network.poll(*this, completions); }

  LoopbackNetwork& network;
  const uint32_t rank;
  std::span<std::byte> memory;
  std::set<uint32_t> peers;
  std::vector<uint32_t> in_flight;  // by rail
  std::vector<uint32_t> unpolled;   // events, by rail
  std::vector<Event> events;        // not polled yet
  Traffic traffic;
};

struct LoopbackNetwork::Write {
  Endpoint* source;
  Endpoint* target;
  WriteRequest request;
  std::vector<std::pair<uint32_t, uint32_t>> pieces;  // begin and end of what is not placed yet
  bool arrives = true;                                // the target has not been told
  bool completes = true;                              // the source has not been told
  std::string error;
  std::vector<std::byte> content;  // the source's bytes when it was posted
  uint64_t number;                 // posts of the whole network before this one

  std::byte* from() const { return source->memory.data() + request.local_offset; }
  std::byte* to() const { return target->memory.data() + request.remote_offset; }
};

LoopbackNetwork::LoopbackNetwork(const Options& options) : random_(options.seed) {
  description_.provider = "loopback";
  for (uint32_t rail = 0; rail < options.rails; ++rail) {
    description_.nics.push_back("loopback" + std::to_string(rail));
  }
  description_.send_queue_depth = options.send_queue_depth;
  description_.completion_queue_depth = options.completion_queue_depth;
  overrun_room_ = options.overrun_room;
  description_.max_write_bytes = uint64_t{1} << 30;
  description_.honours_fence = options.honours_fence;
  early_completions_ = options.early_completions;
  for (uint32_t rank = 0; rank < options.ranks; ++rank) {
    endpoints_.push_back(std::make_unique<Endpoint>(*this, rank, options));
  }
}

LoopbackNetwork::~LoopbackNetwork() = default;

Fabric& LoopbackNetwork::endpoint(uint32_t rank) { return *endpoints_.at(rank); }

void LoopbackNetwork::set_rule(Rule rule) {
  const std::lock_guard lock(mutex_);
  rule_ = std::move(rule);
}

bool LoopbackNetwork::idle() {
  const std::lock_guard lock(mutex_);
  return writes_.empty();
}

LoopbackNetwork::Traffic LoopbackNetwork::traffic(uint32_t rank) {
  const std::lock_guard lock(mutex_);
  return endpoints_.at(rank)->traffic;
}

PostResult LoopbackNetwork::post(Endpoint& source, const WriteRequest& request) {
  const std::lock_guard lock(mutex_);
  Endpoint& target = *endpoints_.at(request.peer);
  if (request.rail >= source.in_flight.size() || !source.peers.contains(request.peer) ||
      request.local_offset + request.bytes > source.memory.size() ||
      request.remote_offset + request.bytes > target.memory.size()) {
    throw std::logic_error("loopback: a write to a wrong rail, peer or address");
  }
  const Fault fault = rule_ ? rule_(source.rank, request) : Fault::kNone;
  if (fault == Fault::kRefuse || source.in_flight[request.rail] == description_.send_queue_depth) {
    ++source.traffic.refusals;
    return PostResult::kAgain;
  }
  Write write{&source, &target, request, {}, true, fault != Fault::kNeverComplete, {}, {}, ++posted_};
  write.content.assign(write.from(), write.from() + request.bytes);
  if (fault == Fault::kFail || !target.peers.contains(source.rank)) {
    write.arrives = false;
    write.error = "the loopback network failed this write";
  } else {
    for (uint32_t begin = 0; begin < request.bytes;) {
      const uint32_t end = begin + 1 + below(request.bytes - begin);
      write.pieces.emplace_back(begin, end);
      begin = end;
    }
  }
  writes_.push_back(std::move(write));
  ++source.in_flight[request.rail];
  ++source.traffic.writes;
  source.traffic.silent += request.notify ? 0 : 1;
  source.traffic.fenced += request.fence ? 1 : 0;
  source.traffic.bytes += request.bytes;
  uint32_t& outstanding = source.traffic.outstanding[request.peer];
  uint32_t& most = source.traffic.most_outstanding[request.peer];
  most = std::max(most, ++outstanding);
  return PostResult::kPosted;
}

size_t LoopbackNetwork::poll(Endpoint& endpoint, std::span<Completion> completions) {
  const std::lock_guard lock(mutex_);
  for (uint32_t steps = 1 + below(16); steps > 0 && !writes_.empty(); --steps) step();
  size_t count = 0;
  for (size_t most = 1 + below(8); count < std::min(most, completions.size()); ++count) {
    if (endpoint.events.empty()) break;
    const auto event = take(endpoint.events, below(endpoint.events.size()));
    --endpoint.unpolled[event.rail];
    completions[count] = event.completion;
    if (event.completion.kind == CompletionKind::kArrival) {
      ++endpoint.traffic.arrivals;
    } else {
      ++endpoint.traffic.completions;
      --endpoint.in_flight[event.rail];
      --endpoint.traffic.outstanding[event.peer];
    }
  }
  return count;
}

void LoopbackNetwork::step() {
  const size_t chosen = below(writes_.size());
  Write& write = writes_[chosen];
  const WriteRequest& request = write.request;
  if (must_wait(write)) return;
  const bool may_complete = write.completes && !completions_held_.load(std::memory_order_relaxed) &&
                            (write.pieces.empty() || (early_completions_ && !request.delivered));
  if (!write.pieces.empty() && (!may_complete || below(4) > 0)) {
    const auto [begin, end] = take(write.pieces, below(write.pieces.size()));
    const std::byte* from = write.completes ? write.from() : write.content.data();
    std::memcpy(write.to() + begin, from + begin, end - begin);
    return;
  }
  if (write.pieces.empty() && write.arrives && (!may_complete || below(2) == 0)) {
    write.arrives = false;
    if (request.notify) {
      tell(*write.target, {{CompletionKind::kArrival, 0, request.immediate, {}}, request.rail, 0});
    }
  } else if (may_complete) {
    write.completes = false;
    if (!std::equal(write.content.begin(), write.content.end(), write.from())) {
      throw std::logic_error("loopback: rank " + std::to_string(write.source->rank) +
                             " changed a write's source before its completion");
    }
    const auto kind = write.error.empty() ? CompletionKind::kWriteDone : CompletionKind::kError;
    tell(*write.source, {{kind, request.context, 0, write.error}, request.rail, request.peer});
  }
  if (!write.arrives && !write.completes) take(writes_, chosen);
}

void LoopbackNetwork::tell(Endpoint& endpoint, const Event& event) {
  endpoint.events.push_back(event);
  if (++endpoint.unpolled[event.rail] > description_.completion_queue_depth + overrun_room_) {
    throw std::logic_error("loopback: a completion queue of rank " + std::to_string(endpoint.rank) +
                           " is overrun");
  }
}

bool LoopbackNetwork::must_wait(const Write& write) const {
  if (!description_.honours_fence) return false;
  const auto same_way = [&](const Write& other) {
    return other.source == write.source && other.target == write.target &&
           other.request.rail == write.request.rail;
  };
  return std::any_of(writes_.begin(), writes_.end(), [&](const Write& fence) {
    return fence.request.fence && fence.number <= write.number && same_way(fence) &&
           std::any_of(writes_.begin(), writes_.end(), [&](const Write& earlier) {
             return earlier.number < fence.number && same_way(earlier) && !earlier.pieces.empty();
           });
  });
}

}  // namespace efa_ep
