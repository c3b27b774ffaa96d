// Rows, moved by one warp each, 16 bytes per lane at a time.
#pragma once

#include "cuda/kernel.cuh"

namespace efa_ep::cuda {

inline constexpr uint32_t kVectorBytes = 16;

/// A warp's own list of rows, in shared memory: where one goes, or what makes a sum, in order. A row has one
/// per slot at most.
struct RowList {
  std::byte* row[kMaxTopK];
  float weight[kMaxTopK];
};

/// Copies `bytes`, a multiple of 16, from `from` to `offset` in each of the first `count` rows of the list:
/// one read, `count` writes.
DP_DEVICE void copy_vectors(const std::byte* from, const RowList& to, uint32_t count, size_t offset,
                            uint32_t bytes) {
  constexpr uint32_t kUnroll = 4;
  const uint32_t vectors = bytes / kVectorBytes;
  for (uint32_t first = 0; first < vectors; first += 32 * kUnroll) {
    uint4 value[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      const uint32_t vector = first + u * 32 + lane_id();
      if (vector < vectors) value[u] = dp::ld_nc(from + size_t{vector} * kVectorBytes);
    }
    for (uint32_t i = 0; i < count; ++i) {
      std::byte* row = to.row[i] + offset;
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        const uint32_t vector = first + u * 32 + lane_id();
        if (vector < vectors) dp::st_na(row + size_t{vector} * kVectorBytes, value[u]);
      }
    }
  }
}

/// The same for bytes of any number and alignment, such as block scales.
DP_DEVICE void copy_bytes(const std::byte* from, std::byte* to, uint32_t bytes) {
  const auto alignment = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | bytes;
  if (alignment % kVectorBytes == 0) {
    for (uint32_t i = lane_id() * kVectorBytes; i < bytes; i += 32 * kVectorBytes) {
      dp::st_na(to + i, dp::ld_nc(from + i));
    }
  } else if (alignment % sizeof(uint32_t) == 0) {
    for (uint32_t i = lane_id() * sizeof(uint32_t); i < bytes; i += 32 * sizeof(uint32_t)) {
      *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(from + i);
    }
  } else {
    for (uint32_t i = lane_id(); i < bytes; i += 32) to[i] = from[i];
  }
}

}  // namespace efa_ep::cuda
