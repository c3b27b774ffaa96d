// The rings through which a device hands work to its proxy.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>

namespace efa_ep {

/// "Send these outgoing rows of the immediate's channel and operation to the rail peer on that node." Packs
/// into 16 bytes, so that a device submits one with a single store.
struct Command {
  uint32_t immediate = 0;         ///< Immediate::encode()
  uint16_t destination_node = 0;  ///< < kMaxNodes
  uint32_t local_row = 0;         ///< first row to send, counted from Layout::outgoing()
  uint16_t first_row = 0;         ///< where in the destination's slot it goes
  uint16_t rows = 0;              ///< <= kMaxTokensPerRank

  constexpr std::array<uint64_t, 2> encode() const {
    return {uint64_t{immediate} << 32 | uint32_t{destination_node} << 1,
            uint64_t{local_row} << 32 | uint32_t{first_row} << 16 | rows};
  }
  static constexpr Command decode(std::array<uint64_t, 2> words) {
    return {.immediate = static_cast<uint32_t>(words[0] >> 32),
            .destination_node = static_cast<uint16_t>(static_cast<uint32_t>(words[0]) >> 1),
            .local_row = static_cast<uint32_t>(words[1] >> 32),
            .first_row = static_cast<uint16_t>(words[1] >> 16),
            .rows = static_cast<uint16_t>(words[1])};
  }
};

/// Many producers, one consumer, no locks. An entry is two words, of which its encode() leaves bit 0 of the
/// first free. That bit carries the lap's parity, and its word is written last: a slot is full when its
/// parity is that of the consumer's lap.
template <class Entry>
class Ring {
 public:
  /// Rounds the capacity up to a power of two.
  explicit Ring(uint32_t capacity)
      : capacity_(std::bit_ceil(capacity)), slots_(std::make_unique<Slot[]>(capacity_)) {}

  /// Returns false if the ring is full.
  bool try_push(const Entry& entry) {
    uint64_t position = head_.load(std::memory_order_relaxed);
    do {
      // Signed: other threads may have moved the tail past a position that was read before.
      const auto used = static_cast<int64_t>(position - tail_.load(std::memory_order_acquire));
      if (used >= int64_t{capacity_}) return false;
    } while (!head_.compare_exchange_weak(position, position + 1, std::memory_order_relaxed));
    Slot& slot = slots_[position & (capacity_ - 1)];
    const auto [first, second] = entry.encode();
    slot.second.store(second, std::memory_order_relaxed);
    slot.first.store(first | parity(position), std::memory_order_release);
    return true;
  }

  /// Returns false if the ring is empty. One consumer at a time.
  bool try_pop(Entry& entry) {
    const uint64_t position = tail_.load(std::memory_order_relaxed);
    const Slot& slot = slots_[position & (capacity_ - 1)];
    const uint64_t first = slot.first.load(std::memory_order_acquire);
    if ((first & 1) != parity(position)) return false;
    entry = Entry::decode({first, slot.second.load(std::memory_order_relaxed)});
    tail_.store(position + 1, std::memory_order_release);
    return true;
  }

  bool empty() const {
    return tail_.load(std::memory_order_acquire) == head_.load(std::memory_order_acquire);
  }
  uint32_t capacity() const { return capacity_; }

 private:
  struct alignas(16) Slot {
    std::atomic<uint64_t> first{0};
    std::atomic<uint64_t> second{0};
  };
  // The first lap writes 1 over the zeros the ring starts with.
  uint64_t parity(uint64_t position) const { return (position / capacity_ + 1) & 1; }

  const uint32_t capacity_;
  const std::unique_ptr<Slot[]> slots_;
  alignas(64) std::atomic<uint64_t> head_{0};
  alignas(64) std::atomic<uint64_t> tail_{0};
};

using CommandRing = Ring<Command>;

}  // namespace efa_ep
