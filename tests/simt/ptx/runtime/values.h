// What PTX registers hold, and how instructions look at it.
//
// A register is raw bits: pred, b16, b32 or b64, whatever type it was declared with. An instruction of type T
// takes the low bits of its operands as a T, and gives a register its result: integers extended as their type
// says, floating point as bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace simt::ptx {

using pred = bool;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;

/// What a register holds before it is written: never zero by luck.
struct Undefined {
  template <class T>
  constexpr operator T() const {
    return static_cast<T>(0xCDCDCDCDCDCDCDCDu);
  }
};
inline constexpr Undefined undefined;

/// The destination of results that nobody wants.
struct Nobody {};
inline constexpr Nobody nobody;

template <class T>
using BitsOf =
    std::conditional_t<std::is_same_v<T, f32>, b32, std::conditional_t<std::is_same_v<T, f64>, b64, T>>;

/// An operand, as a T.
template <class T, class Operand>
constexpr T as(Operand operand) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::bit_cast<T>(static_cast<BitsOf<T>>(operand));
  } else {
    return static_cast<T>(operand);
  }
}

/// The GPU has one NaN for results.
constexpr f32 kNan32 = std::bit_cast<f32>(0x7FFFFFFFu);
constexpr f64 kNan64 = std::bit_cast<f64>(0x7FFFFFFFFFFFFFFFu);

template <class Register, class T>
void set(Register& destination, T value) {
  static_assert(sizeof(Register) >= sizeof(T), "results fit their registers");
  destination = static_cast<Register>(std::bit_cast<BitsOf<T>>(value));
}
template <class T>
void set(const Nobody&, T) {}

/// A result that was computed, not copied.
template <class T>
constexpr T canonical(T value) {
  if constexpr (std::is_same_v<T, f32>) return std::isnan(value) ? kNan32 : value;
  if constexpr (std::is_same_v<T, f64>) return std::isnan(value) ? kNan64 : value;
  return value;
}

}  // namespace simt::ptx
