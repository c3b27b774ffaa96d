// Block-wise quantisation of bf16 rows to fp8 e4m3, on the way into their rows.
#pragma once

#include "cuda/rows.cuh"

namespace efa_ep::cuda {

inline constexpr uint32_t kScaleGroup = 128;  // values that share a scale
inline constexpr float kLargestFp8 = 448.0f;
inline constexpr float kSmallestMagnitude = 1e-10f;  // a block of zeros must not divide by zero

/// The smallest power of two that is not smaller, for normal numbers.
DP_DEVICE float round_up_to_power_of_2(float value) {
  const uint32_t bits = __float_as_uint(value);
  return __uint_as_float((bits + 0x007FFFFFu) & 0x7F800000u);
}

DP_DEVICE uint32_t four_codes(const float* values, float scale) {
  const auto pair = [&](uint32_t i) {
    const float2 scaled{__fdiv_rn(values[i], scale), __fdiv_rn(values[i + 1], scale)};
    return uint32_t{__nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3)};
  };
  return pair(2) << 16 | pair(0);
}

/// Writes `codes` codes, and their scales, at two offsets in each of the first `count` rows of the list. A
/// lane makes 16 codes at a time, so eight lanes share a scale.
template <Quantisation kQuantisation>
DP_DEVICE void quantise_row(const std::byte* from, const RowList& to, uint32_t count, size_t codes_offset,
                            size_t scales_offset, uint32_t codes) {
  constexpr uint32_t kPerLane = 16;
  for (uint32_t first = 0; first < codes; first += 32 * kPerLane) {
    const uint32_t code = first + lane_id() * kPerLane;
    float values[kPerLane] = {};
    if (code < codes) {
      float half[8];
#pragma unroll
      for (uint32_t h = 0; h < 2; ++h) {
        unpack<ScalarType::kBfloat16>(dp::ld_nc(from + size_t{code + 8 * h} * 2), half);
#pragma unroll
        for (uint32_t n = 0; n < 8; ++n) values[8 * h + n] = half[n];
      }
    }
    float largest = kSmallestMagnitude;
#pragma unroll
    for (uint32_t n = 0; n < kPerLane; ++n) largest = fmaxf(largest, fabsf(values[n]));
#pragma unroll
    for (uint32_t distance = 1; distance < kScaleGroup / kPerLane; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, distance));
    }
    float scale = __fdiv_rn(largest, kLargestFp8);
    if constexpr (kQuantisation == Quantisation::kFp8PowerOf2) scale = round_up_to_power_of_2(scale);
    const uint4 packed{four_codes(values, scale), four_codes(values + 4, scale),
                       four_codes(values + 8, scale), four_codes(values + 12, scale)};
    for (uint32_t i = 0; i < count && code < codes; ++i) {
      dp::st_na(to.row[i] + codes_offset + code, packed);
      if (code % kScaleGroup != 0) continue;
      std::byte* scales = to.row[i] + scales_offset;
      if constexpr (kQuantisation == Quantisation::kFp8PowerOf2) {
        scales[code / kScaleGroup] = static_cast<std::byte>(__float_as_uint(scale) >> 23);
      } else {
        reinterpret_cast<float*>(scales)[code / kScaleGroup] = scale;
      }
    }
  }
}

}  // namespace efa_ep::cuda
