// The protocol's bounds. They follow from the widths of the immediate's fields (immediate.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace efa_ep {

inline constexpr uint32_t kMaxNodes = 128;
inline constexpr uint32_t kMaxRanks = 1024;
inline constexpr uint32_t kMaxExperts = 4096;
inline constexpr uint32_t kMaxTopK = 32;
inline constexpr uint32_t kMaxTokensPerRank = 65535;
inline constexpr uint32_t kMaxChannels = 2;

/// Rows start on 16 bytes, so that a device can move them with its widest plain loads and stores.
inline constexpr size_t kRowAlignment = 16;
/// Words written by different ranks lie on different cache lines.
inline constexpr size_t kWordStride = 64;
/// Sections of the layout start on pages.
inline constexpr size_t kSectionAlignment = 4096;

constexpr size_t align_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace efa_ep
