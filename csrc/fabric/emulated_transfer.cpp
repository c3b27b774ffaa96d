// The way of a write: from its NIC's queue, piece by piece into the target's memory, to its two completions.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "fabric/emulated_network.h"

namespace efa_ep {
namespace {

// "EFA status 14, REMOTE_UNKNOWN_PEER: ..."
std::string text_of(EfaStatus status) {
  const auto describe = [&](const char* name, const char* why) {
    return "EFA status " + std::to_string(static_cast<int>(status)) + ", " + name + ": " + why;
  };
  switch (status) {
    case EfaStatus::kOk:
      return describe("OK", "no error");
    case EfaStatus::kFlushed:
      return describe("FLUSHED", "the NIC of this rank is gone");
    case EfaStatus::kRemoteBadAddress:
      return describe("REMOTE_BAD_ADDRESS", "the target has no memory registered under this key and address");
    case EfaStatus::kRemoteAbort:
      return describe("REMOTE_ABORT", "the target's NIC gave up on this write");
    case EfaStatus::kRemoteBadDestQpn:
      return describe("REMOTE_BAD_DEST_QPN", "the target's process is gone");
    case EfaStatus::kUnresponsiveRemote:
      return describe("UNRESP_REMOTE", "the target's NIC stopped answering");
    case EfaStatus::kRemoteUnknownPeer:
      return describe("REMOTE_UNKNOWN_PEER", "the target has not connected this rank");
    case EfaStatus::kUnreachableRemote:
      return describe("UNREACH_REMOTE", "the target's machine does not answer");
  }
  return "EFA status " + std::to_string(static_cast<int>(status));
}

}  // namespace

// --- outbound
// ------------------------------------------------------------------------------------------------

void EmulatedNetwork::schedule_sending(Endpoint& endpoint, uint32_t rail) {
  Nic& nic = endpoint.nics[rail];
  if (nic.sending.empty() && nic.queue.empty()) return;
  if (std::exchange(nic.scheduled, true)) return;
  const Picoseconds free =
      nic.sending.empty() ? std::max(nic.link->send_free, nic.link->next_work_request) : nic.link->send_free;
  schedule(std::max(clock_.time(), free),
           {Event::Kind::kSend, {}, endpoint.id * options_.profile.nics + rail, {}});
}

// Begins what the work request rate allows, and sends one piece.
void EmulatedNetwork::send(Endpoint& endpoint, uint32_t rail) {
  Nic& nic = endpoint.nics[rail];
  nic.scheduled = false;
  // Another endpoint of the NIC was first.
  if (nic.link->send_free > clock_.time()) return schedule_sending(endpoint, rail);
  const EmulatedProfile& profile = options_.profile;
  while (nic.sending.size() < profile.interleaved_writes && nic.link->next_work_request <= clock_.time()) {
    const auto next = std::ranges::find_if(nic.queue, [&](uint32_t id) { return !is_fenced_off(id); });
    if (next == nic.queue.end()) break;
    nic.sending.push_back(*next);
    nic.queue.erase(next);
    nic.link->next_work_request = after(profile.work_request_interval);
  }
  // With nothing but fenced writes left it goes on when one before them is acknowledged.
  if (nic.sending.empty() && nic.link->next_work_request <= clock_.time()) return;
  if (!nic.sending.empty()) {
    const size_t chosen = below(nic.sending.size());
    const uint32_t id = nic.sending[chosen];
    Write& write = writes_[id];
    std::swap(write.unsent[below(write.unsent.size())], write.unsent.back());
    const EmulatedPiece piece = write.unsent.back();
    write.unsent.pop_back();
    if (write.unsent.empty()) {
      std::swap(nic.sending[chosen], nic.sending.back());
      nic.sending.pop_back();
    }
    nic.link->send_free = clock_.time() + transfer_time(piece_bytes(write, piece));
    schedule_write(nic.link->send_free + profile.latency + jitter(), Event::Kind::kArrive, id, piece);
  }
  schedule_sending(endpoint, rail);
}

// A lost piece goes out again behind what the NIC is sending. A dead rank's NIC sends nothing.
void EmulatedNetwork::resend(uint32_t id, EmulatedPiece piece) {
  Write& write = writes_[id];
  Endpoint& source = *endpoints_[write.source];
  if (write.phase != Phase::kMoving || !source.alive) return;
  Nic& nic = source.nics[write.request.rail];
  const bool is_waiting = !write.unsent.empty();
  write.unsent.push_back(piece);
  if (!is_waiting) nic.sending.push_back(id);
  schedule_sending(source, write.request.rail);
}

bool EmulatedNetwork::is_fenced_off(uint32_t id) {
  if (!options_.profile.honours_fence) return false;
  const Write& write = writes_[id];
  EmulatedPath& path = endpoints_[write.source]->nics[write.request.rail].paths[write.target];
  const uint64_t first = *path.unacknowledged.begin();
  while (!path.fences.empty() && path.fences.front() <= first) path.fences.pop_front();
  return !path.fences.empty() && path.fences.front() <= write.number;
}

// A write is acknowledged, or never will be: what a fence held back for it may start.
void EmulatedNetwork::leave_path(const Write& write) {
  if (!options_.profile.honours_fence) return;
  Endpoint& source = *endpoints_[write.source];
  source.nics[write.request.rail].paths[write.target].unacknowledged.erase(write.number);
  schedule_sending(source, write.request.rail);
}

void EmulatedNetwork::take_from_nic(uint32_t id) {
  Write& write = writes_[id];
  leave_path(write);
  Nic& nic = endpoints_[write.source]->nics[write.request.rail];
  std::erase(nic.queue, id);
  std::erase(nic.sending, id);
  write.unsent.clear();
}

// --- inbound
// -------------------------------------------------------------------------------------------------

// The last bit of a piece is at the target's NIC, which is still busy with other senders' pieces or not.
void EmulatedNetwork::arrive(uint32_t id, EmulatedPiece piece) {
  Write& write = writes_[id];
  if (write.phase != Phase::kMoving) return;
  if (clock_.time() < write.held_until) {
    return schedule_write(write.held_until + jitter(), Event::Kind::kArrive, id, piece);
  }
  if (!is_admitted(id)) return;
  const EmulatedProfile& profile = options_.profile;
  Endpoint& source = *endpoints_[write.source];
  if (write.fails_after && write.landed >= *write.fails_after) {
    return fail(id, EfaStatus::kRemoteAbort, after(profile.latency) + jitter());
  }
  const bool by_chance = profile.lost_pieces_per_million > 0 && piece.attempt < UINT8_MAX &&
                         below(1'000'000) < profile.lost_pieces_per_million;
  if (source.alive && (by_chance || piece.attempt < write.losses)) {
    ++count(source).lost_pieces;
    record(TraceKind::kLost, source, write.request.rail, write.number, piece.index);
    ++piece.attempt;
    return schedule_write(after(profile.retransmit_timeout), Event::Kind::kResend, id, piece);
  }
  Nic& nic = endpoints_[write.target]->nics[write.request.rail];
  const Picoseconds busy = nic.link->receive_free + transfer_time(piece_bytes(write, piece));
  nic.link->receive_free = std::max(clock_.time(), busy);
  if (nic.link->receive_free == clock_.time()) return land(id, piece);
  schedule_write(nic.link->receive_free, Event::Kind::kLand, id, piece);
}

void EmulatedNetwork::land(uint32_t id, EmulatedPiece piece) {
  Write& write = writes_[id];
  if (write.phase != Phase::kMoving || !is_admitted(id)) return;
  const size_t offset = size_t{piece.index} * options_.profile.mtu;
  const uint32_t bytes = piece_bytes(write, piece);
  if (bytes > 0) std::memcpy(target_bytes(write) + offset, source_bytes(write) + offset, bytes);
  record(TraceKind::kLanded, *endpoints_[write.target], write.request.rail, write.number, piece.index);
  if (++write.landed < write.pieces) return;
  write.phase = Phase::kLanded;
  if (write.request.notify) schedule_write(clock_.time() + jitter(), Event::Kind::kNotify, id);
  schedule_write(after(options_.profile.latency) + jitter(), Event::Kind::kAcknowledge, id);
}

// Whether the target's NIC takes a piece of this write. If not, decides how the write ends.
bool EmulatedNetwork::is_admitted(uint32_t id) {
  const Write& write = writes_[id];
  const WriteRequest& request = write.request;
  const Endpoint& target = *endpoints_[write.target];
  const auto refuse = [&](EfaStatus status) { fail(id, status, after(options_.profile.latency) + jitter()); };
  if (!target.alive) {
    switch (target.after_death) {
      case AfterDeath::kRefuses:
        refuse(EfaStatus::kRemoteBadDestQpn);
        break;
      case AfterDeath::kUnreachable:
        leave_unanswered(id,
                         write.landed > 0 ? EfaStatus::kUnresponsiveRemote : EfaStatus::kUnreachableRemote);
        break;
      case AfterDeath::kSilent:
        leave_unanswered(id, std::nullopt);
        break;
    }
  } else if (target.nics[request.rail].lost) {
    leave_unanswered(id, EfaStatus::kUnresponsiveRemote);
  } else if (!target.initiators.contains(write.source)) {
    refuse(EfaStatus::kRemoteUnknownPeer);
  } else if (target.key != write.target_key || request.remote_offset > target.memory.size() ||
             request.bytes > target.memory.size() - request.remote_offset) {
    refuse(EfaStatus::kRemoteBadAddress);
  }
  return write.phase == Phase::kMoving;
}

// --- both ends learn of it
// -----------------------------------------------------------------------------------

void EmulatedNetwork::notify(uint32_t id) {
  const Write& write = writes_[id];
  Endpoint& target = *endpoints_[write.target];
  const uint32_t rail = write.request.rail;
  if (!target.alive || target.nics[rail].lost) return;
  ++count(target).arrived;
  record(TraceKind::kArrived, target, rail, write.number, write.request.immediate);
  push_completion(target, rail, {CompletionKind::kArrival, 0, write.request.immediate, {}});
}

void EmulatedNetwork::acknowledge(uint32_t id) {
  Write& write = writes_[id];
  Endpoint& source = *endpoints_[write.source];
  const uint32_t rail = write.request.rail;
  if (source.alive && source.nics[rail].lost) return report_failure(id, EfaStatus::kFlushed);
  write.phase = Phase::kOver;
  if (!source.alive) return;
  leave_path(write);
  EmulatedCounters& counters = count(source);
  ++counters.completed;
  if (options_.check_sources && checksum(write) != write.checksum) ++counters.changed_sources;
  record(TraceKind::kCompleted, source, rail, write.number, 0);
  push_completion(source, rail, {CompletionKind::kWriteDone, write.request.context, 0, {}});
}

void EmulatedNetwork::fail(uint32_t id, EfaStatus status, Picoseconds when) {
  take_from_nic(id);
  writes_[id].phase = Phase::kFailed;
  schedule_write(when, Event::Kind::kFail, id, {}, status);
}

void EmulatedNetwork::leave_unanswered(uint32_t id, std::optional<EfaStatus> status) {
  take_from_nic(id);
  writes_[id].phase = Phase::kUnanswered;
  if (status) schedule_write(after(options_.profile.unreachable_after), Event::Kind::kFail, id, {}, *status);
}

void EmulatedNetwork::report_failure(uint32_t id, EfaStatus status) {
  Write& write = writes_[id];
  Endpoint& source = *endpoints_[write.source];
  if (std::exchange(write.phase, Phase::kOver) == Phase::kOver || !source.alive) return;
  ++count(source).failed;
  record(TraceKind::kFailed, source, write.request.rail, write.number, static_cast<uint64_t>(status));
  push_completion(source, write.request.rail,
                  {CompletionKind::kError, write.request.context, 0, text_of(status)});
}

// --- bytes
// ---------------------------------------------------------------------------------------------------

uint32_t EmulatedNetwork::piece_bytes(const Write& write, EmulatedPiece piece) const {
  const uint64_t offset = uint64_t{piece.index} * options_.profile.mtu;
  return static_cast<uint32_t>(std::min<uint64_t>(options_.profile.mtu, write.request.bytes - offset));
}

Picoseconds EmulatedNetwork::transfer_time(uint32_t bytes) const {
  constexpr uint64_t kPerSecond = std::pico::den;
  return Picoseconds(bytes * kPerSecond / options_.profile.bytes_per_second);
}

std::byte* EmulatedNetwork::target_bytes(const Write& write) const {
  return endpoints_[write.target]->memory.data() + write.request.remote_offset;
}

const std::byte* EmulatedNetwork::source_bytes(const Write& write) const {
  const Endpoint& source = *endpoints_[write.source];
  return source.alive ? source.memory.data() + write.request.local_offset : write.snapshot.data();
}

uint64_t EmulatedNetwork::checksum(const Write& write) const {
  const std::byte* bytes = source_bytes(write);
  uint64_t sum = 0;
  for (uint32_t at = 0; at < write.request.bytes; at += sizeof sum) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min<size_t>(sizeof word, write.request.bytes - at));
    sum = std::rotl((sum ^ word) * 0x9E3779B97F4A7C15, 29);
  }
  return sum;
}

}  // namespace efa_ep
