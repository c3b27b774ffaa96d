// The ring through which a device hands chunks to its proxy.
#pragma once

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
};

/// Many producers, one consumer, no locks. A slot's second word carries the lap's parity, and is written
/// last: a slot is full when its parity is that of the consumer's lap.
class CommandRing {
 public:
  /// Rounds the capacity up to a power of two.
  explicit CommandRing(uint32_t capacity)
      : capacity_(std::bit_ceil(capacity)), slots_(std::make_unique<Slot[]>(capacity_)) {}

  /// Returns false if the ring is full.
  bool try_push(const Command& command) {
    uint64_t position = head_.load(std::memory_order_relaxed);
    do {
      // Signed: other threads may have moved the tail past a position that was read before.
      const auto used = static_cast<int64_t>(position - tail_.load(std::memory_order_acquire));
      if (used >= int64_t{capacity_}) return false;
    } while (!head_.compare_exchange_weak(position, position + 1, std::memory_order_relaxed));
    Slot& slot = slots_[position & (capacity_ - 1)];
    slot.rows.store(uint64_t{command.local_row} << 32 | uint32_t{command.first_row} << 16 | command.rows,
                    std::memory_order_relaxed);
    slot.header.store(
        uint64_t{command.immediate} << 32 | uint32_t{command.destination_node} << 1 | parity(position),
        std::memory_order_release);
    return true;
  }

  /// Returns false if the ring is empty. One consumer at a time.
  bool try_pop(Command& command) {
    const uint64_t position = tail_.load(std::memory_order_relaxed);
    const Slot& slot = slots_[position & (capacity_ - 1)];
    const uint64_t header = slot.header.load(std::memory_order_acquire);
    if ((header & 1) != parity(position)) return false;
    const uint64_t rows = slot.rows.load(std::memory_order_relaxed);
    command = {.immediate = static_cast<uint32_t>(header >> 32),
               .destination_node = static_cast<uint16_t>(static_cast<uint32_t>(header) >> 1),
               .local_row = static_cast<uint32_t>(rows >> 32),
               .first_row = static_cast<uint16_t>(rows >> 16),
               .rows = static_cast<uint16_t>(rows)};
    tail_.store(position + 1, std::memory_order_release);
    return true;
  }

  bool empty() const {
    return tail_.load(std::memory_order_acquire) == head_.load(std::memory_order_acquire);
  }
  uint32_t capacity() const { return capacity_; }

 private:
  struct alignas(16) Slot {
    std::atomic<uint64_t> header{0};
    std::atomic<uint64_t> rows{0};
  };
  // The first lap writes 1 over the zeros the ring starts with.
  uint64_t parity(uint64_t position) const { return (position / capacity_ + 1) & 1; }

  const uint32_t capacity_;
  const std::unique_ptr<Slot[]> slots_;
  alignas(64) std::atomic<uint64_t> head_{0};
  alignas(64) std::atomic<uint64_t> tail_{0};
};

}  // namespace efa_ep
