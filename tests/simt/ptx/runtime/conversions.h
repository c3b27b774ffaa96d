// Copies between registers, and conversions. Numbers shorter than 32 bits are NVIDIA's own host code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <limits>

#include "ptx/runtime/values.h"

namespace simt::ptx {

template <class T, class D, class A>
void mov(D& d, A a) {
  set(d, as<T>(a));
}

/// The first element is the lowest.
template <class T, class D, class... Elements>
void pack(D& d, Elements... elements) {
  constexpr unsigned kShift = 8 * sizeof(T) / sizeof...(Elements);
  unsigned place = 0;
  T packed = 0;
  ((packed |= static_cast<T>(static_cast<T>(elements) << kShift * place++)), ...);
  set(d, packed);
}
template <class T, class A, class... Elements>
void unpack(A a, Elements&... elements) {
  constexpr unsigned kShift = 8 * sizeof(T) / sizeof...(Elements);
  using Element = std::conditional_t<kShift == 32, b32, std::conditional_t<kShift == 16, b16, b8>>;
  unsigned place = 0;
  (set(elements, static_cast<Element>(as<T>(a) >> kShift * place++)), ...);
}

template <class To, class From, class D, class A>
void cvt(D& d, A a) {
  set(d, canonical(static_cast<To>(as<From>(a))));
}

/// Towards zero; what is too large becomes the largest integer. NaN becomes 0 if all is of 32 bits, and an
/// integer's highest bit otherwise.
template <class To, class From, class D, class A>
void cvt_to_integer(D& d, A a) {
  using Limits = std::numeric_limits<To>;
  const From value = as<From>(a);
  if (std::isnan(value)) {
    const bool is_short = sizeof(To) == 4 && sizeof(From) == 4;
    set(d, is_short ? To{0} : static_cast<To>(u64{1} << (8 * sizeof(To) - 1)));
  } else if (value >= std::ldexp(From{1}, Limits::digits)) {
    set(d, Limits::max());
  } else {
    set(d, value <= static_cast<From>(Limits::min()) ? Limits::min() : static_cast<To>(value));
  }
}

template <class A>
void f32_from_bf16(b32& d, A a) {
  set(d, canonical(as<f32>(u32{as<u16>(a)} << 16)));
}
template <class A>
void f32_from_f16(b32& d, A a) {
  set(d, canonical(__half2float(__ushort_as_half(as<u16>(a)))));
}
inline u16 bf16_bits(f32 value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
inline u16 f16_bits(f32 value) { return __half_as_ushort(__float2half_rn(value)); }
template <class D, class A>
void bf16_from_f32(D& d, A a) {
  set(d, bf16_bits(as<f32>(a)));
}
template <class D, class A>
void f16_from_f32(D& d, A a) {
  set(d, f16_bits(as<f32>(a)));
}

// Of two, the first operand is the upper one.

template <class A, class B>
void bf16x2_from_f32(b32& d, A upper, B lower) {
  d = u32{bf16_bits(as<f32>(upper))} << 16 | bf16_bits(as<f32>(lower));
}
template <class A, class B>
void f16x2_from_f32(b32& d, A upper, B lower) {
  d = u32{f16_bits(as<f32>(upper))} << 16 | f16_bits(as<f32>(lower));
}
template <class A, class B>
void e4m3x2_from_f32(b16& d, A upper, B lower) {
  d = __nv_cvt_float2_to_fp8x2(make_float2(as<f32>(lower), as<f32>(upper)), __NV_SATFINITE, __NV_E4M3);
}
template <class A, class B>
void e5m2x2_from_f32(b16& d, A upper, B lower) {
  d = __nv_cvt_float2_to_fp8x2(make_float2(as<f32>(lower), as<f32>(upper)), __NV_SATFINITE, __NV_E5M2);
}

}  // namespace simt::ptx
