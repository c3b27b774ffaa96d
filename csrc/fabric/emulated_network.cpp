// Endpoints, posts, polls, and the order of events.
#include "fabric/emulated_network.h"

#include <algorithm>
#include <utility>

#include "errors.h"

namespace efa_ep {
namespace {

bool outside(uint64_t offset, uint64_t bytes, uint64_t size) {
  return offset > size || bytes > size - offset;
}

}  // namespace

EmulatedNetwork::EmulatedNetwork(EmulatedNetworkOptions options)
    : options_(std::move(options)), random_(options_.seed), id_(random_()), trace_(options_.logged_events) {
  require_valid(options_.profile);
}

// --- time
// ----------------------------------------------------------------------------------------------------

std::optional<std::chrono::nanoseconds> EmulatedNetwork::next_event() const {
  if (events_.empty()) return std::nullopt;
  return std::chrono::ceil<std::chrono::nanoseconds>(events_.next_time());
}

bool EmulatedNetwork::advance() {
  if (events_.empty()) return false;
  const Picoseconds time = events_.next_time();
  clock_.set(time);
  while (!events_.empty() && events_.next_time() == time) process(events_.pop());
  return true;
}

void EmulatedNetwork::advance_to(std::chrono::nanoseconds time) {
  while (!events_.empty() && events_.next_time() <= time) advance();
  clock_.set(std::max<Picoseconds>(clock_.time(), time));
}

bool EmulatedNetwork::advance_until_woken(std::chrono::nanoseconds limit) {
  // Picoseconds reach less far than nanoseconds.
  const Picoseconds end = limit == kForEver ? Picoseconds::max() : Picoseconds(limit);
  while (woken_.empty()) {
    if (events_.empty() || events_.next_time() > end) return false;
    advance();
  }
  return true;
}

std::vector<uint32_t> EmulatedNetwork::take_woken() {
  std::vector<uint32_t> ranks = std::exchange(woken_, {});
  for (uint32_t& entry : ranks) {
    Endpoint& endpoint = *endpoints_[entry];
    endpoint.woken = false;
    entry = endpoint.rank;
  }
  return ranks;
}

void EmulatedNetwork::wake(Endpoint& endpoint) {
  if (std::exchange(endpoint.woken, true)) return;
  woken_.push_back(endpoint.id);
}

void EmulatedNetwork::schedule_write(Picoseconds time, Event::Kind kind, uint32_t write, EmulatedPiece piece,
                                     EfaStatus status) {
  ++writes_[write].events;
  schedule(time, {kind, status, write, piece});
}

void EmulatedNetwork::process(const Event& event) {
  switch (event.kind) {
    case Event::Kind::kSend: {
      const uint32_t nics = options_.profile.nics;
      return send(*endpoints_[event.subject / nics], event.subject % nics);
    }
    case Event::Kind::kFault:
      return strike(scheduled_faults_[event.subject]);
    case Event::Kind::kWake:
      return wake(*endpoints_[event.subject]);
    default:
      return process_write(event);
  }
}

void EmulatedNetwork::process_write(const Event& event) {
  --writes_[event.subject].events;
  switch (event.kind) {
    case Event::Kind::kArrive:
      arrive(event.subject, event.piece);
      break;
    case Event::Kind::kLand:
      land(event.subject, event.piece);
      break;
    case Event::Kind::kResend:
      resend(event.subject, event.piece);
      break;
    case Event::Kind::kNotify:
      notify(event.subject);
      break;
    case Event::Kind::kAcknowledge:
      acknowledge(event.subject);
      break;
    default:
      report_failure(event.subject, event.status);
      break;
  }
  release_if_over(event.subject);
}

Picoseconds EmulatedNetwork::jitter() {
  const Picoseconds most = options_.profile.jitter;
  if (most == Picoseconds::zero()) return most;
  return Picoseconds(below(static_cast<uint64_t>(most.count()) + 1));
}

// --- endpoints
// -----------------------------------------------------------------------------------------------

uint32_t EmulatedNetwork::open(uint32_t rank, std::optional<uint32_t> nics_of) {
  const auto id = static_cast<uint32_t>(endpoints_.size());
  auto endpoint = std::make_unique<Endpoint>();
  endpoint->id = id;
  endpoint->rank = rank;
  endpoint->nics.resize(options_.profile.nics);
  for (uint32_t nic = 0; nics_of && nic < options_.profile.nics; ++nic) {
    endpoint->nics[nic].link = newest(*nics_of).nics[nic].link;
  }
  endpoints_.push_back(std::move(endpoint));
  newest_[rank] = id;
  counters_[rank];
  return id;
}

void EmulatedNetwork::close(uint32_t endpoint) {
  if (endpoints_[endpoint]->alive) kill(*endpoints_[endpoint], AfterDeath::kRefuses, std::nullopt);
}

void EmulatedNetwork::register_memory(uint32_t endpoint, std::span<std::byte> memory) {
  endpoints_[endpoint]->memory = memory;
  endpoints_[endpoint]->key = random_() | 1;  // 0 means none
}

void EmulatedNetwork::connect(uint32_t endpoint, uint32_t peer, const Endpoint::Peer& address) {
  Endpoint& own = *endpoints_[endpoint];
  const auto earlier = own.peers.find(peer);
  if (earlier != own.peers.end()) own.initiators.erase(earlier->second.endpoint);
  own.peers[peer] = address;
  own.initiators.insert(address.endpoint);
}

EmulatedNetwork::Endpoint& EmulatedNetwork::newest(uint32_t rank) const {
  const auto found = newest_.find(rank);
  if (found == newest_.end()) {
    throw ConfigurationError("rank " + std::to_string(rank) + " has no fabric on this emulated network");
  }
  return *endpoints_[found->second];
}

EmulatedCounters EmulatedNetwork::counters(uint32_t rank) const {
  const auto found = counters_.find(rank);
  return found == counters_.end() ? EmulatedCounters{} : found->second;
}

// --- posts
// ---------------------------------------------------------------------------------------------------

PostResult EmulatedNetwork::post(uint32_t endpoint, const WriteRequest& request) {
  Endpoint& source = *endpoints_[endpoint];
  const Endpoint::Peer& target = check_request(source, request);
  Nic& nic = source.nics[request.rail];
  const bool refuses = nic.refuses_until && *nic.refuses_until > clock_.time();
  if (!source.alive || is_frozen(source) || refuses || nic.in_flight == options_.profile.send_queue_depth) {
    ++count(source).refused;
    record(TraceKind::kRefused, source, request.rail, 0, request.bytes);
    return PostResult::kAgain;
  }
  strike_armed(source, request.rail, true);
  const uint32_t write = create_write(source, target, request);
  strike_write(source, write);
  if (nic.lost) {
    fail(write, EfaStatus::kFlushed, clock_.time());
  } else {
    nic.queue.push_back(write);
    schedule_sending(source, request.rail);
  }
  strike_armed(source, request.rail, false);
  return PostResult::kPosted;
}

const EmulatedNetwork::Endpoint::Peer& EmulatedNetwork::check_request(const Endpoint& source,
                                                                      const WriteRequest& request) const {
  const auto refuse = [&](const std::string& why) {
    throw ConfigurationError("a write of " + std::to_string(request.bytes) + " bytes to rank " +
                             std::to_string(request.peer) + " " + why);
  };
  if (request.rail >= source.nics.size()) {
    refuse("names NIC " + std::to_string(request.rail) + " of " + std::to_string(source.nics.size()));
  }
  const auto peer = source.peers.find(request.peer);
  if (peer == source.peers.end()) {
    refuse("comes before connect(); connect it before writing to it");
  }
  if (request.fence && !options_.profile.honours_fence) {
    refuse("is fenced, and the emulated network \"" + options_.profile.name +
           "\" honours no fence; use a signal policy without fences");
  }
  if (request.bytes > options_.profile.max_write_bytes) {
    refuse("is longer than " + std::to_string(options_.profile.max_write_bytes) + "; use smaller chunks");
  }
  if (source.alive && outside(request.local_offset, request.bytes, source.memory.size())) {
    refuse("at local offset " + std::to_string(request.local_offset) + " leaves the registered memory of " +
           std::to_string(source.memory.size()) + " bytes");
  }
  if (outside(request.remote_offset, request.bytes, peer->second.memory_bytes)) {
    refuse("at remote offset " + std::to_string(request.remote_offset) + " leaves the registered memory of " +
           std::to_string(peer->second.memory_bytes) + " bytes");
  }
  return peer->second;
}

uint32_t EmulatedNetwork::create_write(Endpoint& source, const Endpoint::Peer& target,
                                       const WriteRequest& request) {
  if (free_writes_.empty()) {
    free_writes_.push_back(static_cast<uint32_t>(writes_.size()));
    writes_.emplace_back();
  }
  const uint32_t id = free_writes_.back();
  free_writes_.pop_back();
  Write& write = writes_[id];
  write.number = ++writes_created_;
  write.source = source.id;
  write.target = target.endpoint;
  write.target_key = target.key;
  write.request = request;
  const uint32_t mtu = options_.profile.mtu;
  write.pieces = std::max<uint32_t>(1, (request.bytes + uint64_t{mtu} - 1) / mtu);
  for (uint32_t piece = 0; piece < write.pieces; ++piece) write.unsent.push_back({piece, 0});
  if (options_.check_sources) write.checksum = checksum(write);

  Nic& nic = source.nics[request.rail];
  if (options_.profile.honours_fence) {
    EmulatedPath& path = nic.paths[write.target];
    path.unacknowledged.insert(write.number);
    if (request.fence) path.fences.push_back(write.number);
  }
  ++nic.in_flight;
  EmulatedCounters& counters = count(source);
  ++counters.posted;
  counters.bytes += request.bytes;
  counters.most_in_flight = std::max(counters.most_in_flight, nic.in_flight);
  record(TraceKind::kPosted, source, request.rail, write.number, request.bytes);
  return id;
}

void EmulatedNetwork::release_if_over(uint32_t id) {
  Write& write = writes_[id];
  if (write.events > 0 || write.number == 0) return;
  // A dead source does not send again what it has not sent.
  const bool abandoned = !endpoints_[write.source]->alive && write.unsent.empty();
  if (write.phase != Phase::kOver && !abandoned) return;
  std::vector<EmulatedPiece> unsent = std::move(write.unsent);  // its memory is used again
  unsent.clear();
  write = Write{};
  write.unsent = std::move(unsent);
  free_writes_.push_back(id);
}

// --- completions
// ---------------------------------------------------------------------------------------------

void EmulatedNetwork::push_completion(Endpoint& endpoint, uint32_t rail, Completion completion) {
  Nic& nic = endpoint.nics[rail];
  wake(endpoint);
  // A lost NIC still reports, one by one, that its writes failed.
  if (!nic.lost && nic.completions.size() == options_.profile.completion_queue_depth) {
    nic.overrun = true;
    record(TraceKind::kOverrun, endpoint, rail, 0, nic.completions.size());
    lose_nic(endpoint, rail);
    return;
  }
  nic.completions.push_back(std::move(completion));
  uint32_t& most = count(endpoint).most_unpolled;
  most = std::max(most, static_cast<uint32_t>(nic.completions.size()));
}

size_t EmulatedNetwork::poll(uint32_t id, std::span<Completion> completions) {
  Endpoint& endpoint = *endpoints_[id];
  if (!endpoint.alive || is_frozen(endpoint)) return 0;
  size_t filled = 0;
  // Another NIC first each time, so that a busy one does not starve the rest.
  const size_t first = endpoint.first_polled++;
  for (size_t i = 0; i < endpoint.nics.size(); ++i) {
    Nic& nic = endpoint.nics[(first + i) % endpoint.nics.size()];
    for (; filled < completions.size() && !nic.completions.empty(); nic.completions.pop_front()) {
      if (nic.completions.front().kind != CompletionKind::kArrival) --nic.in_flight;
      completions[filled++] = std::move(nic.completions.front());
    }
  }
  if (filled > 0 || completions.empty()) return filled;
  for (size_t rail = 0; rail < endpoint.nics.size(); ++rail) {
    if (!endpoint.nics[rail].overrun) continue;
    throw TransportError("the completion queue of NIC " + std::to_string(rail) + " of rank " +
                             std::to_string(endpoint.rank) + " was overrun: more than " +
                             std::to_string(options_.profile.completion_queue_depth) +
                             " completions were not polled; poll more often or bound the writes on their way",
                         -1);
  }
  return 0;
}

}  // namespace efa_ep
