// The ring through which kernels hand chunks to the proxy. It lies in pinned host memory; a kernel fills an
// entry with one 16-byte store.
//
// Both words of an entry carry the lap's parity, because a 16-byte store need not become visible as one: an
// entry is full when both have the parity of the consumer's lap. Command::encode() leaves bit 0 of the first
// word free, and bit 63 of the second (row numbers are below 2^23).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "protocol/limits.h"
#include "proxy/command_ring.h"
#include "proxy/command_source.h"

namespace efa_ep::cuda {

struct alignas(16) RingEntry {
  uint64_t first = 0;
  uint64_t second = 0;
};

inline constexpr uint64_t kSecondParityBit = uint64_t{1} << 63;
static_assert(uint64_t{kMaxNodes} * kMaxTokensPerRank < uint64_t{1} << 31);

/// Parity of a position's lap in a ring of `capacity` entries, a power of two. The first lap writes 1 over
/// the zeros that the ring starts with.
constexpr uint64_t ring_parity(uint64_t position, uint32_t capacity) { return (position / capacity + 1) & 1; }

constexpr RingEntry ring_entry(const Command& command, uint64_t position, uint32_t capacity) {
  const std::array<uint64_t, 2> words = command.encode();
  const uint64_t parity = ring_parity(position, capacity);
  return {words[0] | parity, words[1] | parity * kSecondParityBit};
}

/// The proxy's end. One thread at a time.
class DeviceRingReader final : public CommandSource {
 public:
  /// `entries` are zero at the start. `tail` and `stop` are words that the device reads, 0 at the start;
  /// another `stop` ends its waits.
  DeviceRingReader(RingEntry* entries, uint64_t* tail, uint32_t* stop, uint32_t capacity)
      : entries_(entries), tail_(*tail), stop_(*stop), capacity_(capacity) {}

  bool try_pop(Command& command) override {
    RingEntry entry;
    if (!read_next(entry)) return false;
    command = Command::decode({entry.first, entry.second & ~kSecondParityBit});
    ++position_;
    tail_.store(position_, std::memory_order_release);
    return true;
  }
  bool empty() const override {
    RingEntry entry;
    return !read_next(entry);
  }
  void end_waits() override { stop_.store(1, std::memory_order_release); }

 private:
  // Returns false if the next entry is not full.
  bool read_next(RingEntry& entry) const {
    RingEntry& next = entries_[position_ & (capacity_ - 1)];
    const uint64_t parity = ring_parity(position_, capacity_);
    entry.first = std::atomic_ref(next.first).load(std::memory_order_acquire);
    if ((entry.first & 1) != parity) return false;
    entry.second = std::atomic_ref(next.second).load(std::memory_order_acquire);
    return (entry.second & kSecondParityBit) == parity * kSecondParityBit;
  }

  RingEntry* const entries_;
  const std::atomic_ref<uint64_t> tail_;
  const std::atomic_ref<uint32_t> stop_;
  const uint32_t capacity_;
  uint64_t position_ = 0;
};

}  // namespace efa_ep::cuda
