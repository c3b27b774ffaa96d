// Numbers in rows: how 16 bytes of them become float32, and back.
#pragma once

#include "cuda/kernel.cuh"

namespace efa_ep::cuda {

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

}  // namespace efa_ep::cuda
