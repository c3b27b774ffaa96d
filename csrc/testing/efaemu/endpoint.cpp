#include "testing/efaemu/endpoint.h"

#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "testing/efaemu/interposition.h"

namespace efaemu {
namespace {

using Clock = std::chrono::steady_clock;

// When a peer that the carrier cannot reach counts as dead. To connect takes long on a busy machine, but then
// this process does not try often either.
constexpr std::chrono::seconds kUnreachableAfter{3};
constexpr uint32_t kUnreachableTries = 1000;

long environment(const char* name, long fallback) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtol(text, nullptr, 10) : fallback;
}

/// A write that was posted and not yet handed to the carrier.
struct Write {
  iovec source;
  void* descriptor;
  fi_addr_t peer;
  fi_rma_iov destination;
  uint64_t immediate;
  uint64_t flags;
  void* context;
  Clock::time_point due;
};

/// A peer that the carrier cannot reach at the moment.
struct Outage {
  Clock::time_point since;
  Clock::time_point tried;
  uint32_t tries;
};

struct Queue;

struct Endpoint : Interposed {
  Endpoint(fid_ep& endpoint, fid_domain& domain, bool needs_receives)
      : Interposed(*endpoint.fid.ops), endpoint(endpoint), domain(domain), needs_receives(needs_receives) {}

  fid_ep& endpoint;
  fid_domain& domain;
  const bool needs_receives;
  const fi_ops_rma* carrier_rma = nullptr;
  fi_ops_rma rma{};
  fi_ops_msg msg{};
  Queue* queue = nullptr;

  const size_t depth = send_queue_depth();
  const long delay_us = environment("EFAEMU_DELAY_US", 20);
  const long jitter_us = environment("EFAEMU_JITTER_US", 100);
  std::mt19937_64 random{static_cast<uint64_t>(environment("EFAEMU_SEED", 1))};
  std::vector<Write> waiting;
  std::unordered_set<void*> in_flight;  // contexts, from post to completion
  std::unordered_map<fi_addr_t, Outage> outages;
  std::deque<void*> receives;  // contexts of posted receives
};

/// A completion queue; it serves one endpoint.
struct Queue : Interposed {
  explicit Queue(fid_cq& queue)
      : Interposed(*queue.fid.ops), carrier_cq(queue.ops), cq(copy_of(*queue.ops)) {}

  const fi_ops_cq* carrier_cq;
  fi_ops_cq cq;
  Endpoint* endpoint = nullptr;
  std::deque<fi_cq_err_entry> errors;     // writes that the carrier did not take
  std::deque<fi_cq_data_entry> arrivals;  // immediates that wait for a posted receive
};

/// The device writes into the context until the completion.
void scribble(void* context) { std::memset(context, 0xa5, sizeof(fi_context2)); }

/// What EFA refuses, what it would corrupt silently, and what it would report as a failed write.
bool legal(const Endpoint& state, const fi_msg_rma& message, uint64_t flags) {
  if (flags & (FI_FENCE | FI_INJECT) || !(flags & FI_COMPLETION)) return false;
  if (message.iov_count != 1 || message.rma_iov_count != 1 || message.context == nullptr) return false;
  const iovec& source = message.msg_iov[0];
  if (source.iov_len != message.rma_iov[0].len || source.iov_len > kMaxMessageBytes) return false;
  if ((flags & FI_REMOTE_CQ_DATA) && (message.data >> (8 * kCqDataBytes)) != 0) return false;
  if (message.desc == nullptr || message.desc[0] == nullptr) return false;
  if (!is_registered(state.domain, message.desc[0], source.iov_base, source.iov_len)) return false;
  return !state.in_flight.contains(message.context);
}

ssize_t post_write(fid_ep* endpoint, const fi_msg_rma* message, uint64_t flags) {
  Endpoint& state = state_of<Endpoint>(endpoint->fid);
  if (!legal(state, *message, flags)) return -FI_EINVAL;
  if (state.in_flight.size() >= state.depth) return -FI_EAGAIN;
  const long jitter = state.jitter_us > 0 ? static_cast<long>(state.random() % state.jitter_us) : 0;
  scribble(message->context);
  state.in_flight.insert(message->context);
  state.waiting.push_back({message->msg_iov[0], message->desc[0], message->addr, message->rma_iov[0],
                           message->data, flags, message->context,
                           Clock::now() + std::chrono::microseconds(state.delay_us + jitter)});
  return 0;
}

ssize_t hand_to_carrier(Endpoint& state, Write& write) {
  fi_msg_rma message{};
  message.msg_iov = &write.source;
  message.desc = &write.descriptor;
  message.iov_count = 1;
  message.addr = write.peer;
  message.rma_iov = &write.destination;
  message.rma_iov_count = 1;
  message.context = write.context;
  message.data = write.immediate;
  return state.carrier_rma->writemsg(&state.endpoint, &message, write.flags);
}

void fail(Endpoint& state, void* context, int error) {
  fi_cq_err_entry entry{};
  entry.op_context = context;
  entry.flags = FI_RMA | FI_WRITE;
  entry.err = error;
  state.queue->errors.push_back(entry);
}

/// Hands a write to the carrier. Returns whether it is gone: taken, or failed. TCP refuses writes to a dead
/// peer for ever, so after a while they fail as they would on EFA.
bool try_release(Endpoint& state, Write& write, Clock::time_point now) {
  const auto outage = state.outages.find(write.peer);
  const bool known = outage != state.outages.end();
  if (known && outage->second.tried == now)
    return false;  // one try per peer and poll, each costs a connection
  const ssize_t result = hand_to_carrier(state, write);
  if (result == -FI_EAGAIN) {
    Outage& current = state.outages.try_emplace(write.peer, Outage{now, now, 0}).first->second;
    current.tried = now;
    if (++current.tries < kUnreachableTries || now - current.since < kUnreachableAfter) return false;
    fail(state, write.context, FI_EHOSTUNREACH);
    return true;
  }
  if (known) state.outages.erase(outage);
  if (result != 0) fail(state, write.context, static_cast<int>(-result));
  return true;
}

/// Hands writes that are due to the carrier in random order; what it refuses stays for the next time.
void release_due_writes(Endpoint& state) {
  const Clock::time_point now = Clock::now();
  const auto due = std::partition(state.waiting.begin(), state.waiting.end(),
                                  [now](const Write& write) { return write.due > now; });
  std::shuffle(due, state.waiting.end(), state.random);
  const auto left =
      std::remove_if(due, state.waiting.end(), [&](Write& write) { return try_release(state, write, now); });
  state.waiting.erase(left, state.waiting.end());
}

void finish(Endpoint& state, void* context) {
  if (state.in_flight.erase(context) > 0) scribble(context);
}

ssize_t read_carrier(Queue& state, fid_cq* queue, fi_cq_data_entry* entries, size_t count) {
  const ssize_t result = state.carrier_cq->read(queue, entries, count);
  for (ssize_t i = 0; i < result; ++i) finish(*state.endpoint, entries[i].op_context);
  return result;
}

/// Gives each waiting arrival a posted receive; without one the device would retry for ever.
ssize_t match_receives(Queue& state, fi_cq_data_entry* entries, size_t count) {
  size_t matched = 0;
  std::deque<void*>& receives = state.endpoint->receives;
  while (matched < count && !state.arrivals.empty() && !receives.empty()) {
    entries[matched] = state.arrivals.front();
    entries[matched].op_context = receives.front();
    entries[matched++].flags |= FI_RECV;
    scribble(receives.front());
    receives.pop_front();
    state.arrivals.pop_front();
  }
  return matched > 0 ? static_cast<ssize_t>(matched) : -FI_EAGAIN;
}

ssize_t read_queue(fid_cq* queue, void* buffer, size_t count) {
  Queue& state = state_of<Queue>(queue->fid);
  auto* entries = static_cast<fi_cq_data_entry*>(buffer);
  if (state.endpoint == nullptr || count == 0) return -FI_EAGAIN;
  release_due_writes(*state.endpoint);
  if (!state.errors.empty()) return -FI_EAVAIL;
  if (!state.endpoint->needs_receives) return read_carrier(state, queue, entries, count);

  if (const ssize_t matched = match_receives(state, entries, count); matched > 0) return matched;
  const ssize_t result = read_carrier(state, queue, entries, count);
  if (result < 0) return result;
  ssize_t kept = 0;
  for (ssize_t i = 0; i < result; ++i) {
    if (entries[i].flags & FI_REMOTE_CQ_DATA) {
      state.arrivals.push_back(entries[i]);
    } else {
      entries[kept++] = entries[i];
    }
  }
  return kept > 0 ? kept : match_receives(state, entries, count);
}

ssize_t read_error(fid_cq* queue, fi_cq_err_entry* entry, uint64_t flags) {
  Queue& state = state_of<Queue>(queue->fid);
  if (state.endpoint == nullptr) return -FI_EAGAIN;
  ssize_t result = 1;
  if (state.errors.empty()) {
    result = state.carrier_cq->readerr(queue, entry, flags);
  } else {
    *entry = state.errors.front();
    state.errors.pop_front();
  }
  if (result > 0) finish(*state.endpoint, entry->op_context);
  return result;
}

ssize_t post_receive(fid_ep* endpoint, void* buffer, size_t bytes, void* descriptor, fi_addr_t,
                     void* context) {
  Endpoint& state = state_of<Endpoint>(endpoint->fid);
  if (context == nullptr || !is_registered(state.domain, descriptor, buffer, bytes)) return -FI_EINVAL;
  if (state.receives.size() >= state.depth) return -FI_EAGAIN;
  scribble(context);
  state.receives.push_back(context);
  return 0;
}

int bind(fid* endpoint, fid* other, uint64_t flags) {
  Endpoint& state = state_of<Endpoint>(*endpoint);
  if (other->fclass == FI_CLASS_CQ) {
    Queue& queue = state_of<Queue>(*other);
    if (queue.endpoint != nullptr && queue.endpoint != &state) return -FI_EINVAL;
    queue.endpoint = &state;
    state.queue = &queue;
  }
  return state.carrier->bind(endpoint, other, flags);
}

int close_endpoint(fid* endpoint) {
  Queue* queue = state_of<Endpoint>(*endpoint).queue;
  const int result = close<Endpoint>(endpoint);
  if (result == 0 && queue != nullptr) queue->endpoint = nullptr;
  return result;
}

}  // namespace

size_t send_queue_depth() { return static_cast<size_t>(environment("EFAEMU_DEPTH", 64)); }

bool unsolicited_writes() { return environment("EFAEMU_UNSOLICITED", 1) != 0; }

void interpose(fid_ep& endpoint, fid_domain& domain, bool needs_receives) {
  auto* state = new Endpoint(endpoint, domain, needs_receives);
  state->fi_ops::close = close_endpoint;
  state->fi_ops::bind = bind;
  endpoint.fid.ops = state;

  state->carrier_rma = endpoint.rma;
  state->rma.size = sizeof state->rma;
  state->rma.read = not_emulated;
  state->rma.readv = not_emulated;
  state->rma.readmsg = not_emulated;
  state->rma.write = not_emulated;
  state->rma.writev = not_emulated;
  state->rma.writemsg = post_write;
  state->rma.inject = not_emulated;
  state->rma.writedata = not_emulated;
  state->rma.injectdata = not_emulated;
  endpoint.rma = &state->rma;

  state->msg.size = sizeof state->msg;
  state->msg.recv = post_receive;
  state->msg.recvv = not_emulated;
  state->msg.recvmsg = not_emulated;
  state->msg.send = not_emulated;
  state->msg.sendv = not_emulated;
  state->msg.sendmsg = not_emulated;
  state->msg.inject = not_emulated;
  state->msg.senddata = not_emulated;
  state->msg.injectdata = not_emulated;
  endpoint.msg = &state->msg;
}

void interpose(fid_cq& queue) {
  auto* state = new Queue(queue);
  state->fi_ops::close = close<Queue>;
  queue.fid.ops = state;
  state->cq.read = read_queue;
  state->cq.readerr = read_error;  // the others stay: the carrier's read() calls its readfrom() here
  queue.ops = &state->cq;
}

}  // namespace efaemu
