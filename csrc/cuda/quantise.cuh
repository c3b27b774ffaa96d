// Block-wise quantisation of bf16 rows to fp8 e4m3, on the way into their rows.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/rows.cuh"

namespace efa_ep::cuda {

/// The smallest power of two that is not smaller, for normal numbers.
DP_DEVICE float round_up_to_power_of_2(float value) {
  const uint32_t bits = __float_as_uint(value);
  return __uint_as_float((bits + 0x007FFFFFu) & 0x7F800000u);
}

/// The codes of four bf16 values, two per word.
DP_DEVICE uint32_t four_codes(uint32_t low, uint32_t high, float scale) {
  const auto two_codes = [scale](uint32_t word) {
    float values[2];
    Numbers<ScalarType::kBfloat16>::unpack(word, values);
    const float2 scaled{__fdiv_rn(values[0], scale), __fdiv_rn(values[1], scale)};
    return uint32_t{__nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3)};
  };
  return two_codes(high) << 16 | two_codes(low);
}

/// The largest magnitude among eight bf16 values: without their signs they are ordered as integers.
DP_DEVICE uint32_t largest_of(uint4 vector) {
  const auto of_word = [](uint32_t word) { return max(word & 0x7FFFu, word >> 16 & 0x7FFFu); };
  return max(max(of_word(vector.x), of_word(vector.y)), max(of_word(vector.z), of_word(vector.w)));
}

/// Writes `codes` codes, and their scales, at two offsets in each of the first `count` rows of the list. A
/// lane makes 16 codes at a time, so eight lanes share a scale.
template <Quantisation kQuantisation>
DP_DEVICE void quantise_row(const std::byte* from, const RowList& to, uint32_t count, size_t codes_offset,
                            size_t scales_offset, uint32_t codes) {
  constexpr uint32_t kPerLane = 16;
  for (uint32_t first = 0; first < codes; first += 32 * kPerLane) {
    const uint32_t code = first + lane_id() * kPerLane;
    uint4 low{};  // 8 bf16 values each
    uint4 high{};
    if (code < codes) {
      low = dp::ld_nc(from + size_t{code} * 2);
      high = dp::ld_nc(from + size_t{code} * 2 + kVectorBytes);
    }
    uint32_t bits = max(largest_of(low), largest_of(high));
#pragma unroll
    for (uint32_t distance = 1; distance < kScaleGroup / kPerLane; distance *= 2) {
      bits = max(bits, __shfl_xor_sync(kFullWarp, bits, distance));
    }
    const float largest = fmaxf(__uint_as_float(bits << 16), kSmallestMagnitude);
    float scale = __fdiv_rn(largest, kLargestFp8);
    if constexpr (kQuantisation != Quantisation::kFp8) scale = round_up_to_power_of_2(scale);
    const uint4 packed{four_codes(low.x, low.y, scale), four_codes(low.z, low.w, scale),
                       four_codes(high.x, high.y, scale), four_codes(high.z, high.w, scale)};
    for (uint32_t i = 0; i < count && code < codes; ++i) {
      dp::st_na(to.row[i] + codes_offset + code, packed);
      if (code % kScaleGroup != 0) continue;
      std::byte* scales = to.row[i] + scales_offset;
      if constexpr (kQuantisation == Quantisation::kFp8Ue8m0) {
        scales[code / kScaleGroup] = static_cast<std::byte>(__float_as_uint(scale) >> 23);
      } else {
        reinterpret_cast<float*>(scales)[code / kScaleGroup] = scale;
      }
    }
  }
}

}  // namespace efa_ep::cuda
