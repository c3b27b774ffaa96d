#include "cpu/quantise.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace efa_ep {
namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint8_t kNotANumber = 0x7F;

/// The smallest power of two that is not smaller, for normal numbers.
float round_up_to_power_of_2(float value) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x007FFFFFu) & 0x7F800000u);
}

/// The nearest e4m3 code (4 exponent bits with bias 7, 3 fraction bits), ties to the even one; beyond the
/// largest, the largest.
uint8_t code_of(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & kMagnitude;
  const float bounded = std::min(std::bit_cast<float>(magnitude), kLargestFp8);
  // Normal: rounds away the 20 lower of 23 fraction bits, a carry goes into the exponent.
  const uint32_t kept = std::bit_cast<uint32_t>(bounded);
  const uint32_t normal = (kept + 0x7FFFFu + (kept >> 20 & 1)) >> 20;
  const uint32_t of_normal = normal - ((127 - 7) << 3);
  // Subnormal, below 2^-6: beside 2^14, whose unit is 2^-9, the addition rounds.
  const float beside = bounded + 16384.0f;
  const uint32_t of_subnormal = std::bit_cast<uint32_t>(beside) - std::bit_cast<uint32_t>(16384.0f);
  const uint32_t code = bounded < 0.015625f ? of_subnormal : of_normal;
  if (magnitude > kInfinity) return kNotANumber;
  return static_cast<uint8_t>(code | (bits >> 24 & 0x80u));
}

}  // namespace

void quantise_row(const std::byte* bf16, uint32_t values, Quantisation kind, std::byte* codes,
                  std::byte* scales) {
  for (uint32_t group = 0; group < values / kScaleGroup; ++group) {
    std::array<uint16_t, kScaleGroup> numbers;
    std::memcpy(numbers.data(), bf16 + size_t{group} * sizeof numbers, sizeof numbers);
    uint16_t most = 0;  // without their signs, bf16 numbers are ordered as integers
    for (const uint16_t number : numbers) most = std::max<uint16_t>(most, number & 0x7FFF);
    const auto largest = std::bit_cast<float>(uint32_t{most} << 16);
    // A comparison with what is not a number is false, which leaves the smallest, as fmaxf() does.
    float scale = (largest > kSmallestMagnitude ? largest : kSmallestMagnitude) / kLargestFp8;
    if (kind != Quantisation::kFp8) scale = round_up_to_power_of_2(scale);
    if (kind == Quantisation::kFp8Ue8m0) {
      scales[group] = static_cast<std::byte>(std::bit_cast<uint32_t>(scale) >> 23);
    } else {
      std::memcpy(scales + size_t{group} * sizeof scale, &scale, sizeof scale);
    }
    for (uint32_t i = 0; i < kScaleGroup; ++i) {
      codes[size_t{group} * kScaleGroup + i] =
          static_cast<std::byte>(code_of(std::bit_cast<float>(uint32_t{numbers[i]} << 16) / scale));
    }
  }
}

}  // namespace efa_ep
