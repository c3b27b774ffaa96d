// How dispatch makes rows from what it reads. Both kinds of device make the same bytes.
#pragma once

#include <cstdint>

namespace efa_ep {

enum class Quantisation : uint8_t {
  kNone,  ///< rows are copied
  kFp8,   ///< bf16 -> fp8 e4m3, a multiple of 128 values; per 128 of them one float32 scale, the largest
          ///< magnitude / 448
  kFp8PowerOf2,  ///< the same, the scale rounded up to a power of two
  kFp8Ue8m0,     ///< the same power of two, stored as one ue8m0 byte
};

inline constexpr uint32_t kScaleGroup = 128;  ///< values that share a scale
inline constexpr float kLargestFp8 = 448.0f;
inline constexpr float kSmallestMagnitude = 1e-10f;  ///< a group of zeros must not divide by zero

}  // namespace efa_ep
