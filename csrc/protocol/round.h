// Monotone words: how a device learns that something of a round is complete.
#pragma once

#include <cstdint>

namespace efa_ep {

/// A round number (from 1) and a row count in one 64-bit word that only grows.
struct RoundWord {
  uint32_t round = 0;
  uint32_t rows = 0;

  constexpr uint64_t encode() const { return static_cast<uint64_t>(round) << 32 | rows; }
  static constexpr RoundWord decode(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(bits)};
  }
};

}  // namespace efa_ep
