// Rows, moved and summed by one warp each, 16 bytes per lane at a time.
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

// ---- copies --------------------------------------------------------------------------------------------

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

// ---- sums ----------------------------------------------------------------------------------------------

/// The numbers in 16 bytes of a combine row.
template <ScalarType kType>
struct Numbers;

template <>
struct Numbers<ScalarType::kBfloat16> {
  static constexpr uint32_t kCount = 8;
  DP_DEVICE static void unpack(uint32_t word, float* to) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xFFFF0000u);
  }
  DP_DEVICE static uint32_t pack(const float* from) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
    return uint32_t{__bfloat16_as_ushort(pair.y)} << 16 | __bfloat16_as_ushort(pair.x);
  }
};

template <>
struct Numbers<ScalarType::kFloat16> {
  static constexpr uint32_t kCount = 8;
  DP_DEVICE static void unpack(uint32_t word, float* to) {
    to[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    to[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  DP_DEVICE static uint32_t pack(const float* from) {
    const __half2 pair = __floats2half2_rn(from[0], from[1]);
    return uint32_t{__half_as_ushort(pair.y)} << 16 | __half_as_ushort(pair.x);
  }
};

template <>
struct Numbers<ScalarType::kFloat32> {
  static constexpr uint32_t kCount = 4;
  DP_DEVICE static void unpack(uint32_t word, float* to) { to[0] = __uint_as_float(word); }
  DP_DEVICE static uint32_t pack(const float* from) { return __float_as_uint(from[0]); }
};

template <ScalarType kType>
DP_DEVICE void unpack(uint4 vector, float (&numbers)[Numbers<kType>::kCount]) {
  constexpr uint32_t kPerWord = Numbers<kType>::kCount / 4;
  Numbers<kType>::unpack(vector.x, numbers);
  Numbers<kType>::unpack(vector.y, numbers + kPerWord);
  Numbers<kType>::unpack(vector.z, numbers + 2 * kPerWord);
  Numbers<kType>::unpack(vector.w, numbers + 3 * kPerWord);
}

template <ScalarType kType>
DP_DEVICE uint4 pack(const float (&numbers)[Numbers<kType>::kCount]) {
  constexpr uint32_t kPerWord = Numbers<kType>::kCount / 4;
  return {Numbers<kType>::pack(numbers), Numbers<kType>::pack(numbers + kPerWord),
          Numbers<kType>::pack(numbers + 2 * kPerWord), Numbers<kType>::pack(numbers + 3 * kPerWord)};
}

/// out = sum over the first `count` rows of the list, in order, of weight * row, in float32 and rounded once:
/// what sum_rows() does on the CPU (cpu/row_math.h), bit for bit. No row gives zeros; a single one of weight
/// 1 is copied. `out` may be one of the rows.
template <ScalarType kType>
DP_DEVICE void sum_rows(std::byte* out, const RowList& terms, uint32_t count, uint32_t bytes) {
  constexpr uint32_t kCount = Numbers<kType>::kCount;
  const bool copy = count == 1 && terms.weight[0] == 1.0f;
  if (copy && terms.row[0] == out) return;
  for (uint32_t at = lane_id() * kVectorBytes; at < bytes; at += 32 * kVectorBytes) {
    if (count == 0) {
      dp::st_na(out + at, uint4{0, 0, 0, 0});
      continue;
    }
    const uint4 first = dp::ld_na(terms.row[0] + at);
    if (copy) {
      dp::st_na(out + at, first);
      continue;
    }
    float total[kCount];
    unpack<kType>(first, total);
#pragma unroll
    for (uint32_t n = 0; n < kCount; ++n) total[n] = __fmul_rn(terms.weight[0], total[n]);
    for (uint32_t term = 1; term < count; ++term) {
      float numbers[kCount];
      unpack<kType>(dp::ld_na(terms.row[term] + at), numbers);
      const float weight = terms.weight[term];
#pragma unroll
      for (uint32_t n = 0; n < kCount; ++n) {
        total[n] = __fadd_rn(total[n], __fmul_rn(weight, numbers[n]));
      }
    }
    dp::st_na(out + at, pack<kType>(total));
  }
}

}  // namespace efa_ep::cuda
