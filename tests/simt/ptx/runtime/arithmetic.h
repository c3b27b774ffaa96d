// Integers, floating point, comparison and choice. Compile with -ffp-contract=off.
#pragma once

#include <limits>

#include "engine/simt.h"
#include "ptx/runtime/values.h"

namespace simt::ptx {

// ---- integers, modulo 2^bits -----------------------------------------------------------------------------

template <class T, class D, class A, class B>
void add(D& d, A a, B b) {
  set(d, static_cast<T>(u64(as<T>(a)) + u64(as<T>(b))));
}
template <class T, class D, class A, class B>
void sub(D& d, A a, B b) {
  set(d, static_cast<T>(u64(as<T>(a)) - u64(as<T>(b))));
}

template <class T>
using Wider =
    std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                                          std::conditional_t<std::is_signed_v<T>, s32, u32>>>;

template <class T, class A, class B>
Wider<T> product(A a, B b) {
  return static_cast<Wider<T>>(as<T>(a)) * static_cast<Wider<T>>(as<T>(b));
}
template <class T, class A, class B>
T low_product(A a, B b) {
  return static_cast<T>(u64(as<T>(a)) * u64(as<T>(b)));
}
template <class T, class A, class B>
T high_product(A a, B b) {
  return static_cast<T>(product<T>(a, b) >> (8 * sizeof(T)));
}

template <class T, class D, class A, class B>
void mul_lo(D& d, A a, B b) {
  set(d, low_product<T>(a, b));
}
template <class T, class D, class A, class B>
void mul_hi(D& d, A a, B b) {
  set(d, high_product<T>(a, b));
}
template <class T, class D, class A, class B>
void mul_wide(D& d, A a, B b) {
  set(d, product<T>(a, b));
}
template <class T, class D, class A, class B, class C>
void mad_lo(D& d, A a, B b, C c) {
  add<T>(d, low_product<T>(a, b), c);
}
template <class T, class D, class A, class B, class C>
void mad_hi(D& d, A a, B b, C c) {
  add<T>(d, high_product<T>(a, b), c);
}
template <class T, class D, class A, class B, class C>
void mad_wide(D& d, A a, B b, C c) {
  add<Wider<T>>(d, product<T>(a, b), c);
}

/// What PTX leaves open is an error here.
template <class T, class A, class B>
void check_division(A a, B b) {
  if (as<T>(b) == 0) die("division by zero");
  if constexpr (std::is_signed_v<T>) {
    if (as<T>(a) == std::numeric_limits<T>::min() && as<T>(b) == -1) die("division overflow");
  }
}
template <class T, class D, class A, class B>
void div(D& d, A a, B b) {
  check_division<T>(a, b);
  set(d, static_cast<T>(as<T>(a) / as<T>(b)));
}
template <class T, class D, class A, class B>
void rem(D& d, A a, B b) {
  check_division<T>(a, b);
  set(d, static_cast<T>(as<T>(a) % as<T>(b)));
}

// ---- floating point --------------------------------------------------------------------------------------

template <class T, class D, class A, class B>
void add_rn(D& d, A a, B b) {
  set(d, canonical(as<T>(a) + as<T>(b)));
}
template <class T, class D, class A, class B>
void sub_rn(D& d, A a, B b) {
  set(d, canonical(as<T>(a) - as<T>(b)));
}
template <class T, class D, class A, class B>
void mul_rn(D& d, A a, B b) {
  set(d, canonical(as<T>(a) * as<T>(b)));
}
template <class T, class D, class A, class B>
void div_rn(D& d, A a, B b) {
  set(d, canonical(as<T>(a) / as<T>(b)));
}
template <class T, class D, class A, class B, class C>
void fma_rn(D& d, A a, B b, C c) {
  set(d, canonical(std::fma(as<T>(a), as<T>(b), as<T>(c))));
}
template <class T, class D, class A>
void rcp_rn(D& d, A a) {
  set(d, canonical(T{1} / as<T>(a)));
}
template <class T, class D, class A>
void sqrt_rn(D& d, A a) {
  set(d, canonical(std::sqrt(as<T>(a))));
}

// ---- both ------------------------------------------------------------------------------------------------

template <class T>
bool is_unordered(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::isunordered(a, b);
  return false;
}
template <class T>
bool is_negative(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::signbit(a);
  return a < 0;
}

/// A number is both smaller and larger than NaN, and -0 smaller than 0.
template <class T, class D, class A, class B>
void min(D& d, A a, B b) {
  const T x = as<T>(a), y = as<T>(b);
  const bool first = is_unordered(x, y) ? y != y : x == y ? is_negative(x) : x < y;
  set(d, canonical(first ? x : y));
}
template <class T, class D, class A, class B>
void max(D& d, A a, B b) {
  const T x = as<T>(a), y = as<T>(b);
  const bool first = is_unordered(x, y) ? y != y : x == y ? !is_negative(x) : x > y;
  set(d, canonical(first ? x : y));
}
template <class T, class D, class A>
void neg(D& d, A a) {
  if constexpr (std::is_floating_point_v<T>) {
    set(d, -as<T>(a));
  } else {
    sub<T>(d, 0, a);
  }
}
template <class T, class D, class A>
void abs(D& d, A a) {
  if constexpr (std::is_floating_point_v<T>) {
    set(d, std::fabs(as<T>(a)));
  } else if (as<T>(a) < 0) {
    sub<T>(d, 0, a);
  } else {
    set(d, as<T>(a));
  }
}

// ---- comparison, choice ----------------------------------------------------------------------------------

/// The ones that end in u are true for unordered operands. lo, ls, hi and hs compare unsigned integers.
enum class Compare { eq, ne, lt, le, gt, ge, lo, ls, hi, hs, equ, neu, ltu, leu, gtu, geu, num, nan };

template <Compare kCompare, class T>
bool compare(T a, T b) {
  switch (kCompare) {
    case Compare::eq:
      return a == b;
    case Compare::ne:
      return a != b && !is_unordered(a, b);
    case Compare::lt:
    case Compare::lo:
      return a < b;
    case Compare::le:
    case Compare::ls:
      return a <= b;
    case Compare::gt:
    case Compare::hi:
      return a > b;
    case Compare::ge:
    case Compare::hs:
      return a >= b;
    case Compare::equ:
      return !(a < b || a > b);
    case Compare::neu:
      return a != b;
    case Compare::ltu:
      return !(a >= b);
    case Compare::leu:
      return !(a > b);
    case Compare::gtu:
      return !(a <= b);
    case Compare::geu:
      return !(a < b);
    case Compare::num:
      return !is_unordered(a, b);
    case Compare::nan:
      return is_unordered(a, b);
  }
}
template <Compare kCompare, class T, class A, class B>
void setp(pred& d, A a, B b) {
  d = compare<kCompare>(as<T>(a), as<T>(b));
}
template <class T, class D, class A, class B>
void selp(D& d, A a, B b, pred p) {
  set(d, p ? as<T>(a) : as<T>(b));
}

}  // namespace simt::ptx
