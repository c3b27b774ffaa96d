#include "proxy/tile_puts.h"

#include <algorithm>
#include <string>

#include "errors.h"
#include "protocol/chunking.h"

namespace efa_ep {
namespace {

constexpr size_t kPollBatch = 64;
// Puts taken and writes posted per piece of work: bounds how long the caller is kept.
constexpr uint32_t kPutBatch = 64;

// The context of a write says that it is of a tile put, and of which.
constexpr uint64_t kTileContext = uint64_t{1} << 63;
constexpr uint64_t context_of(const TilePut& put) {
  return kTileContext | uint64_t{put.group} << 32 | put.peer;
}
constexpr uint32_t context_peer(uint64_t context) { return static_cast<uint32_t>(context); }
constexpr uint32_t context_group(uint64_t context) { return context >> 32 & (kMaxTileGroups - 1); }

void require(bool holds, const std::string& what) {
  if (!holds) throw ConfigurationError("tile put: " + what);
}

void require_at_most(const char* name, uint64_t value, uint64_t limit, const char* remedy) {
  if (value <= limit) return;
  throw ConfigurationError("tile put: " + std::string(name) + " is " + std::to_string(value) +
                           ", the limit is " + std::to_string(limit) + "; " + remedy);
}

/// Writes that each of the other ranks may leave in this rank's completion queues, and this rank in theirs:
/// connected fabrics have equal room. Half of it is the rounds'.
uint32_t window_of(const FabricDescription& fabric, uint32_t ranks) {
  const uint32_t own = fabric.send_queue_depth;
  const uint32_t room = fabric.completion_queue_depth > own ? fabric.completion_queue_depth - own : 0;
  return room / 2 / std::max(1u, ranks - 1);
}

}  // namespace

TilePuts::TilePuts(Fabric& fabric, std::span<uint64_t> words, const TilePutOptions& options)
    : fabric_(fabric),
      words_(words),
      options_(options),
      rails_(fabric.rails()),
      window_(window_of(fabric.description(), options.ranks)),
      ring_(options.ring_commands),
      destinations_(options.ranks),
      outgoing_(size_t{options.ranks} * options.groups),
      incoming_(size_t{options.ranks} * options.groups),
      completions_(kPollBatch) {
  require_at_most("number of ranks", options.ranks, kMaxRanks, "use fewer ranks");
  require_at_most("number of groups", options.groups, kMaxTileGroups, "put more transfers into a group");
  require(options.rank < options.ranks && options.groups > 0,
          "rank " + std::to_string(options.rank) + " of " + std::to_string(options.ranks) + " with " +
              std::to_string(options.groups) + " groups makes no sense");
  require(window_ > 0, "completion queues of " + std::to_string(fabric.description().completion_queue_depth) +
                           " have no room for a write of each of " + std::to_string(options.ranks) +
                           " ranks beside own writes and rounds; use fewer ranks");
  require(options.chunk_bytes > 0, "chunks of 0 bytes; use a positive chunk size");
  const size_t needed = TilePuts::words(options.ranks, options.groups);
  require(words.size() >= needed, std::to_string(words.size()) + " words; pass " + std::to_string(needed));
}

bool TilePuts::try_submit(const TilePut& put) {
  require(put.peer < options_.ranks && put.peer != options_.rank,
          "to rank " + std::to_string(put.peer) + " from rank " + std::to_string(options_.rank) + " of " +
              std::to_string(options_.ranks) + "; name another rank");
  require_at_most("group", put.group, options_.groups - 1, "configure more groups");
  require_at_most("number of transfers of a group", put.transfers, kMaxTileGroupWrites, "use more groups");
  require(put.transfers > 0, "a group of 0 transfers; a group without tiles is one transfer of 0 bytes");
  require_at_most("length", put.bytes, kMaxTileBytes, "cut it into several transfers");
  require_at_most("remote offset", put.remote_offset, kMaxTileReach - kTileAlignment, "use a lower address");
  require((put.bytes | put.local_offset | put.remote_offset) % kTileAlignment == 0,
          "offsets and length must be multiples of " + std::to_string(kTileAlignment) + " bytes");
  return ring_.try_push(put);
}

bool TilePuts::drive() {
  const size_t count = fabric_.poll(completions_);
  for (size_t i = 0; i < count; ++i) {
    if (!owns(completions_[i])) {
      throw ProtocolError("a completion that is not of a tile put, on a fabric that carries nothing else");
    }
    complete(completions_[i]);
  }
  return work() || count > 0;
}

bool TilePuts::work() {
  const bool taken = take_puts();
  bool posted = false;
  // One write per destination and turn: no peer's queue, and none of its NICs, waits for another's to empty.
  for (uint32_t turn = 0; turn < kPutBatch && !busy_.empty(); ++turn) {
    bool moved = false;
    std::erase_if(busy_, [&](uint32_t peer) {
      moved |= post_one(peer);
      return destinations_[peer].queue.empty();
    });
    if (!moved) break;
    posted = true;
    // Whoever found the fabric's last room was first; next time it is another.
    if (busy_.size() > 1) std::rotate(busy_.begin(), busy_.begin() + 1, busy_.end());
  }
  return taken || posted;
}

bool TilePuts::take_puts() {
  TilePut put;
  uint32_t taken = 0;
  // Queues hold no more than the ring does, so that a slow network slows producers down.
  while (taken < kPutBatch && queued_ < ring_.capacity() && ring_.try_pop(put)) {
    enqueue(put);
    ++taken;
  }
  return taken > 0;
}

void TilePuts::enqueue(const TilePut& put) {
  Outgoing& group = outgoing_[index(put.peer, put.group)];
  if (group.taken == 0) group.announced = put.transfers;
  const auto name = [&] {
    return "group " + std::to_string(put.group) + " to rank " + std::to_string(put.peer);
  };
  require(group.announced == put.transfers, name() + " has " + std::to_string(group.announced) +
                                                " transfers according to its first put, and " +
                                                std::to_string(put.transfers) + " according to another");
  Transfer transfer{.put = put, .generation = group.generation};
  transfer.writes = static_cast<uint32_t>(
      std::max<uint64_t>(1, (put.bytes + options_.chunk_bytes - 1) / options_.chunk_bytes));
  ++group.taken;
  group.writes += transfer.writes;
  group.incomplete += transfer.writes;
  require_at_most("number of writes of a group", group.writes, kMaxTileGroupWrites,
                  "use longer chunks or more groups");
  if (group.taken == group.announced) {
    transfer.group_writes = group.writes;
    group = Outgoing{.generation = group.generation + 1, .incomplete = group.incomplete};
  }
  Destination& destination = destinations_[put.peer];
  if (destination.queue.empty()) busy_.push_back(put.peer);
  destination.queue.push_back(transfer);
  ++queued_;
  add(counters_.transfers, 1);
}

/// Posts the next write to a peer that has one.
bool TilePuts::post_one(uint32_t peer) {
  Destination& destination = destinations_[peer];
  if (destination.outstanding >= window_) {
    add(counters_.waits, 1);
    destination.refusal.note(peer, options_.clock->now(), options_.timeout);
    return false;
  }
  const WriteRequest request = next_write(destination);
  if (fabric_.post_write(request) == PostResult::kAgain) {
    add(counters_.retries, 1);
    if (outstanding_ > destination.outstanding) {
      // The queue may be full of writes to others, for which this destination must not be blamed.
      destination.refusal.end();
    } else {
      destination.refusal.note(peer, options_.clock->now(), options_.timeout);
    }
    return false;
  }
  destination.refusal.end();
  ++destination.posted;
  ++destination.outstanding;
  ++outstanding_;
  add(counters_.writes, 1);
  add(counters_.bytes, request.bytes);
  Transfer& transfer = destination.queue.front();
  if (++transfer.posted == transfer.writes) {
    destination.queue.pop_front();
    --queued_;
  }
  return true;
}

WriteRequest TilePuts::next_write(const Destination& destination) const {
  const Transfer& transfer = destination.queue.front();
  const TilePut& put = transfer.put;
  const uint64_t start = transfer.posted * options_.chunk_bytes;
  const bool ends_transfer = transfer.posted + 1 == transfer.writes;
  const bool ends_group = ends_transfer && transfer.group_writes > 0;
  // Nothing follows this write until some are complete, so none may wait for what follows.
  const bool fills_window = destination.outstanding + 1 == window_;
  const TileImmediate immediate{.source = options_.rank,
                                .generation = transfer.generation,
                                .group = put.group,
                                .writes = ends_group ? transfer.group_writes : 0};
  WriteRequest request;
  request.peer = put.peer;
  request.rail = rail_of(options_.rank, put.peer, options_.ranks, destination.posted, rails_);
  request.local_offset = put.local_offset + start;
  request.remote_offset = put.remote_offset + start;
  request.bytes = static_cast<uint32_t>(std::min(options_.chunk_bytes, put.bytes - start));
  request.immediate = immediate.encode();
  request.context = context_of(put);
  request.ends = ends_group || fills_window ? Ends::kGroup : ends_transfer ? Ends::kTransfer : Ends::kNothing;
  return request;
}

bool TilePuts::owns(const Completion& completion) {
  return completion.kind == CompletionKind::kArrival ? TileImmediate::is_one(completion.immediate)
                                                     : (completion.context & kTileContext) != 0;
}

void TilePuts::complete(const Completion& completion) {
  if (completion.kind == CompletionKind::kArrival) return on_arrival(completion.immediate);
  const uint32_t peer = context_peer(completion.context);
  if (completion.kind == CompletionKind::kError) {
    throw TransportError("a tile put to rank " + std::to_string(peer) + " failed: " + completion.error, peer);
  }
  --destinations_[peer].outstanding;
  destinations_[peer].refusal.end();
  --outstanding_;
  add(counters_.completions, 1);
  const size_t number = index(peer, context_group(completion.context));
  Outgoing& group = outgoing_[number];
  // With a generation begun already, it waits for that one too: rare, and never too early.
  if (--group.incomplete == 0 && group.taken == 0) {
    word(outgoing_.size() + number).store(group.generation, std::memory_order_release);
  }
}

void TilePuts::on_arrival(uint32_t bits) {
  const TileImmediate immediate = TileImmediate::decode(bits);
  const auto refuse = [&](const std::string& why) {
    throw ProtocolError("an arriving tile's immediate " + std::to_string(bits) + " (group " +
                        std::to_string(immediate.group) + " of rank " + std::to_string(immediate.source) +
                        ") " + why);
  };
  if (immediate.source >= options_.ranks || immediate.source == options_.rank) refuse("names no other rank");
  if (immediate.group >= options_.groups) refuse("names no group");
  Incoming& group = incoming_[index(immediate.source, immediate.group)];
  if (immediate.generation != (group.generation & 1)) {
    refuse("belongs to another use of the group; a group is free again when its reader has seen its signal");
  }
  ++group.seen;
  add(counters_.immediates, 1);
  if (immediate.writes > 0) {
    if (group.writes > 0) refuse("announces the number of writes twice");
    group.writes = immediate.writes;
  }
  if (group.writes == 0) return;
  if (group.seen > group.writes) refuse("is one more write than announced");
  if (group.seen < group.writes) return;
  group = Incoming{.generation = group.generation + 1};
  add(counters_.signals, 1);
  word(index(immediate.source, immediate.group)).store(group.generation, std::memory_order_release);
}

std::set<uint32_t> TilePuts::unfinished_peers() const {
  std::set<uint32_t> peers;
  for (uint32_t peer = 0; peer < destinations_.size(); ++peer) {
    const Destination& destination = destinations_[peer];
    if (destination.outstanding > 0 || !destination.queue.empty()) peers.insert(peer);
  }
  return peers;
}

TilePutCounters TilePuts::counters() const {
  const auto read = [](const std::atomic<uint64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  return {.transfers = read(counters_.transfers),
          .writes = read(counters_.writes),
          .bytes = read(counters_.bytes),
          .completions = read(counters_.completions),
          .immediates = read(counters_.immediates),
          .signals = read(counters_.signals),
          .retries = read(counters_.retries),
          .waits = read(counters_.waits)};
}

}  // namespace efa_ep
