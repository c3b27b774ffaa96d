// Logic, shifts, bit fields and bytes.
#pragma once

#include <bit>

#include "engine/simt.h"
#include "ptx/runtime/values.h"

namespace simt::ptx {

template <class T, class D, class A, class B>
void bit_and(D& d, A a, B b) {
  set(d, static_cast<T>(u64{as<T>(a)} & u64{as<T>(b)}));
}
template <class T, class D, class A, class B>
void bit_or(D& d, A a, B b) {
  set(d, static_cast<T>(u64{as<T>(a)} | u64{as<T>(b)}));
}
template <class T, class D, class A, class B>
void bit_xor(D& d, A a, B b) {
  set(d, static_cast<T>(u64{as<T>(a)} ^ u64{as<T>(b)}));
}
template <class T, class D, class A>
void bit_not(D& d, A a) {
  if constexpr (std::is_same_v<T, pred>) {
    d = !a;
  } else {
    set(d, static_cast<T>(~as<T>(a)));
  }
}

// ---- shifts, by any amount -------------------------------------------------------------------------------

template <class T>
constexpr u32 kBits = 8 * sizeof(T);

template <class T>
constexpr T shifted_left(T value, u32 amount) {
  return amount < kBits<T> ? static_cast<T>(u64(value) << amount) : T{0};
}
/// Signed numbers keep their sign.
template <class T>
constexpr T shifted_right(T value, u32 amount) {
  if (amount < kBits<T>) return static_cast<T>(value >> amount);
  return std::is_signed_v<T> && value < 0 ? static_cast<T>(-1) : T{0};
}
template <class T, class D, class A, class B>
void shl(D& d, A a, B amount) {
  set(d, shifted_left(as<T>(a), as<u32>(amount)));
}
template <class T, class D, class A, class B>
void shr(D& d, A a, B amount) {
  set(d, shifted_right(as<T>(a), as<u32>(amount)));
}

/// What a funnel shift by more than 32 does.
enum class Shift { wrap, clamp };
template <Shift kShift>
constexpr u32 funnel_amount(u32 amount) {
  return kShift == Shift::wrap ? amount % 32 : amount > 32 ? 32 : amount;
}
inline u64 funnel(u32 low, u32 high) { return u64{high} << 32 | low; }

template <Shift kShift, class A, class B, class C>
void shf_l(b32& d, A low, B high, C amount) {
  d = static_cast<u32>(funnel(as<u32>(low), as<u32>(high)) << funnel_amount<kShift>(as<u32>(amount)) >> 32);
}
template <Shift kShift, class A, class B, class C>
void shf_r(b32& d, A low, B high, C amount) {
  d = static_cast<u32>(funnel(as<u32>(low), as<u32>(high)) >> funnel_amount<kShift>(as<u32>(amount)));
}

// ---- counting --------------------------------------------------------------------------------------------

template <class T, class A>
void popc(b32& d, A a) {
  d = static_cast<u32>(std::popcount(as<T>(a)));
}
template <class T, class A>
void clz(b32& d, A a) {
  d = static_cast<u32>(std::countl_zero(as<T>(a)));
}
template <class T, class D, class A>
void brev(D& d, A a) {
  T reversed = 0;
  for (u32 bit = 0; bit < kBits<T>; ++bit) reversed = static_cast<T>(reversed << 1 | (as<T>(a) >> bit & 1));
  set(d, reversed);
}
/// The highest bit that is not the sign's, as a distance from the top; all ones if there is none.
template <class T, class A>
void bfind_shift_amount(b32& d, A a) {
  using Unsigned = std::make_unsigned_t<T>;
  const T value = as<T>(a);
  const auto bits = static_cast<Unsigned>(value < 0 ? ~value : value);
  d = bits == 0 ? 0xFFFFFFFFu : static_cast<u32>(std::countl_zero(bits));
}
template <class T, class A>
void bfind(b32& d, A a) {
  bfind_shift_amount<T>(d, a);
  if (d != 0xFFFFFFFFu) d = kBits<T> - 1 - d;
}

// ---- fields ----------------------------------------------------------------------------------------------

/// Bits beyond the top are the sign's, or zero.
template <class T, class D, class A, class B, class C>
void bfe(D& d, A a, B position, C length) {
  const u32 first = as<u32>(position) % 256;
  const u32 count = as<u32>(length) % 256;
  const T rest = shifted_right(as<T>(a), first);
  if (count == 0) return set(d, T{0});
  if (first + count >= kBits<T>) return set(d, rest);
  set(d, shifted_right(shifted_left(rest, kBits<T> - count), kBits<T> - count));
}
/// Puts the low bits of `a` into `b`.
template <class T, class D, class A, class B, class C, class E>
void bfi(D& d, A a, B b, C position, E length) {
  const u32 first = as<u32>(position) % 256;
  const u32 count = as<u32>(length) % 256;
  const T ones = static_cast<T>(shifted_left(T{1}, count) - 1);  // all of them if the length is too large
  const T mask = shifted_left(ones, first);
  set(d, static_cast<T>((as<T>(b) & ~mask) | (shifted_left(as<T>(a), first) & mask)));
}

// ---- any function of three bits, any four of eight bytes -------------------------------------------------

template <class A, class B, class C, class Table>
void lop3(b32& d, A a, B b, C c, Table table) {
  d = 0;
  const u32 x = as<u32>(a), y = as<u32>(b), z = as<u32>(c);
  for (u32 row = 0; row < 8; ++row) {
    if ((as<u32>(table) >> row & 1) == 0) continue;
    d |= (row & 4 ? x : ~x) & (row & 2 ? y : ~y) & (row & 1 ? z : ~z);
  }
}
template <class A, class B, class C>
void prmt(b32& d, A a, B b, C selector) {
  const u64 bytes = funnel(as<u32>(a), as<u32>(b));
  u32 result = 0;
  for (u32 place = 0; place < 4; ++place) {
    const u32 choice = as<u32>(selector) >> (4 * place) & 0xF;
    u32 byte = static_cast<u32>(bytes >> (8 * (choice & 7))) & 0xFF;
    if ((choice & 8) != 0) byte = (byte & 0x80) != 0 ? 0xFF : 0;  // its sign
    result |= byte << (8 * place);
  }
  d = result;
}

}  // namespace simt::ptx
