// How faults strike.
#include "fabric/emulated_faults.h"

#include <algorithm>
#include <string>

#include "errors.h"
#include "fabric/emulated_network.h"

namespace efa_ep {
namespace {

bool strikes_writes(const Fault& fault) {
  return fault.kind == FaultKind::kFailWrites || fault.kind == FaultKind::kLosePieces;
}

bool concerns(const Fault& fault, uint32_t rail) { return !fault.rail || *fault.rail == rail; }

}  // namespace

void EmulatedNetwork::inject(const Fault& fault) {
  Endpoint& endpoint = newest(fault.rank);
  const auto require = [&](bool valid, const std::string& what) {
    if (!valid) throw ConfigurationError("a fault of rank " + std::to_string(fault.rank) + " " + what);
  };
  require(!fault.rail || *fault.rail < endpoint.nics.size(),
          "names a NIC that does not exist; it has " + std::to_string(endpoint.nics.size()));
  require(!(fault.at && fault.at_post), "has two triggers; choose a time or a post");
  require(!fault.at_post || *fault.at_post > 0, "waits for post 0; posts count from 1");
  require(!fault.at || *fault.at >= now(), "lies in the past");
  require(fault.losses < UINT8_MAX, "loses pieces too often; 254 times at most");
  if (fault.at_post) {
    endpoint.armed.push_back({fault, *fault.at_post});
  } else if (fault.at) {
    const auto number = static_cast<uint32_t>(scheduled_faults_.size());
    scheduled_faults_.push_back(fault);
    schedule(*fault.at, {Event::Kind::kFault, {}, number, {}});
  } else {
    strike(fault);
  }
}

// A write-striking fault begins with the write that triggers it; the others happen after it.
void EmulatedNetwork::strike_armed(Endpoint& endpoint, uint32_t rail, bool before_the_write) {
  std::vector<Fault> due;
  for (Endpoint::Armed& armed : endpoint.armed) {
    if (before_the_write && concerns(armed.fault, rail)) --armed.posts_left;
    if (armed.posts_left == 0 && strikes_writes(armed.fault) == before_the_write) due.push_back(armed.fault);
  }
  std::erase_if(endpoint.armed, [&](const Endpoint::Armed& armed) {
    return armed.posts_left == 0 && strikes_writes(armed.fault) == before_the_write;
  });
  for (const Fault& fault : due) strike(fault);
}

void EmulatedNetwork::strike(const Fault& fault) {
  Endpoint& endpoint = newest(fault.rank);
  if (!endpoint.alive) return;
  record(TraceKind::kFault, endpoint, fault.rail.value_or(0), 0, static_cast<uint64_t>(fault.kind));
  const Picoseconds until = fault.duration ? after(*fault.duration) : Picoseconds::max();
  const auto wake_at_the_end = [&] {
    if (fault.duration) schedule(until, {Event::Kind::kWake, {}, endpoint.id, {}});
  };
  switch (fault.kind) {
    case FaultKind::kFailWrites:
    case FaultKind::kLosePieces:
      endpoint.striking.push_back({fault, fault.writes});
      return;
    case FaultKind::kLoseNic:
      for (uint32_t rail = 0; rail < endpoint.nics.size(); ++rail) {
        if (concerns(fault, rail)) lose_nic(endpoint, rail);
      }
      return;
    case FaultKind::kRefusePosts:
      for (uint32_t rail = 0; rail < endpoint.nics.size(); ++rail) {
        if (concerns(fault, rail)) endpoint.nics[rail].refuses_until = until;
      }
      return wake_at_the_end();
    case FaultKind::kFreeze:
      endpoint.frozen_until = until;
      return wake_at_the_end();
    case FaultKind::kThaw:
      endpoint.frozen_until.reset();
      return wake(endpoint);
    case FaultKind::kDie:
      return kill(endpoint, fault.after_death, fault.late_by);
  }
}

// Lets the faults that wait for writes of this NIC meet a new one.
void EmulatedNetwork::strike_write(Endpoint& source, uint32_t id) {
  Write& write = writes_[id];
  for (Endpoint::Striking& striking : source.striking) {
    if (!concerns(striking.fault, write.request.rail)) continue;
    --striking.writes_left;
    if (striking.fault.kind == FaultKind::kFailWrites) {
      write.fails_after = static_cast<uint32_t>(below(write.pieces));
    } else {
      write.losses = striking.fault.losses;
    }
  }
  std::erase_if(source.striking,
                [](const Endpoint::Striking& striking) { return striking.writes_left == 0; });
}

void EmulatedNetwork::lose_nic(Endpoint& endpoint, uint32_t rail) {
  endpoint.nics[rail].lost = true;
  for (uint32_t id = 0; id < writes_.size(); ++id) {
    const Write& write = writes_[id];
    const bool of_the_nic = write.number != 0 && write.source == endpoint.id && write.request.rail == rail;
    const bool undecided = write.phase == Phase::kMoving || write.phase == Phase::kUnanswered;
    if (of_the_nic && undecided) fail(id, EfaStatus::kFlushed, clock_.time());
  }
}

void EmulatedNetwork::kill(Endpoint& endpoint, AfterDeath after_death,
                           const std::optional<std::chrono::nanoseconds>& late_by) {
  std::vector<uint32_t> own;
  for (uint32_t id = 0; id < writes_.size(); ++id) {
    if (writes_[id].number != 0 && writes_[id].source == endpoint.id) own.push_back(id);
  }
  for (const uint32_t id : own) {
    Write& write = writes_[id];
    if (write.phase != Phase::kMoving) continue;
    const std::byte* bytes = source_bytes(write);
    write.snapshot.assign(bytes, bytes + write.request.bytes);
    let_land_after_death(id, late_by);
  }
  for (Nic& nic : endpoint.nics) nic = Nic{};
  endpoint.alive = false;
  endpoint.after_death = after_death;
  endpoint.memory = {};
  endpoint.key = 0;
  for (const uint32_t id : own) {
    if (writes_[id].phase == Phase::kUnanswered || writes_[id].phase == Phase::kFailed) {
      writes_[id].phase = Phase::kOver;
    }
    release_if_over(id);
  }
}

// What is on its way lands, unless something else stops it. What is not goes out or does not.
void EmulatedNetwork::let_land_after_death(uint32_t id,
                                           const std::optional<std::chrono::nanoseconds>& late_by) {
  Write& write = writes_[id];
  if (late_by) write.held_until = after(*late_by);
  if (late_by || below(2) == 0) {
    const Picoseconds earliest = late_by ? write.held_until : after(options_.profile.latency);
    for (const EmulatedPiece piece : write.unsent) {
      schedule_write(earliest + jitter(), Event::Kind::kArrive, id, piece);
    }
  }
  write.unsent.clear();
}

}  // namespace efa_ep
