// Atomic accesses with an order and a scope, for the host build of the kernels.
//
// Every function here is a synchronising access: it checks the scope against the owner of the
// memory, is a preemption point for the schedule fuzzer, feeds the polling detector (so that a raw
// spin loop cannot monopolise its OS thread) and, for relaxed accesses under TSan, takes part in
// the emulation of standalone fences (see memory_order.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine/simt.h"

namespace simt {

template <class T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
inline T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr bool has_acquire(int order) {
  return order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
}
constexpr bool has_release(int order) {
  return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
}

template <int Order, class T>
inline T load(const T* p, Scope scope) {
  check_align(p, sizeof(T));
  check_scope(p, scope);
  preempt_point();
  T value;
  __atomic_load(p, &value, Order);
  note_load(p, to_bits(value), !has_acquire(Order));
  return value;
}

template <int Order, class T>
inline void store(T* p, T value, Scope scope) {
  check_align(p, sizeof(T));
  check_scope(p, scope);
  preempt_point();
  has_release(Order) ? note_release(scope) : note_relaxed_store(p);
  __atomic_store(p, &value, Order);
  if (scope == Scope::sys) told_others();
}

namespace detail {

template <int Order, class T>
inline void before_rmw(T* p, Scope scope) {
  check_align(p, sizeof(T));
  check_scope(p, scope);
  preempt_point();
  has_release(Order) ? note_release(scope) : note_relaxed_store(p);
}

template <int Order, class T>
inline T after_rmw(T* p, T old) {
  note_load(p, to_bits(old), !has_acquire(Order));
  return old;
}

// Compare-and-swap loop for what has no builtin (min, max, floating point add).
template <int Order, class T, class F>
inline T update(T* p, Scope scope, F&& new_value) {
  before_rmw<Order>(p, scope);
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  for (;;) {
    T desired = new_value(old);
    if (__atomic_compare_exchange(p, &old, &desired, false, Order, __ATOMIC_RELAXED)) break;
  }
  return after_rmw<Order>(p, old);
}

}  // namespace detail

template <int Order, class T>
inline T fetch_add(T* p, T value, Scope scope) {
  if constexpr (std::is_integral_v<T>) {
    detail::before_rmw<Order>(p, scope);
    return detail::after_rmw<Order>(p, static_cast<T>(__atomic_fetch_add(p, value, Order)));
  } else {
    return detail::update<Order>(p, scope, [value](T old) { return old + value; });
  }
}

template <int Order, class T>
inline T fetch_and(T* p, T value, Scope scope) {
  detail::before_rmw<Order>(p, scope);
  return detail::after_rmw<Order>(p, static_cast<T>(__atomic_fetch_and(p, value, Order)));
}

template <int Order, class T>
inline T fetch_or(T* p, T value, Scope scope) {
  detail::before_rmw<Order>(p, scope);
  return detail::after_rmw<Order>(p, static_cast<T>(__atomic_fetch_or(p, value, Order)));
}

template <int Order, class T>
inline T fetch_min(T* p, T value, Scope scope) {
  return detail::update<Order>(p, scope, [value](T old) { return value < old ? value : old; });
}

template <int Order, class T>
inline T fetch_max(T* p, T value, Scope scope) {
  return detail::update<Order>(p, scope, [value](T old) { return old < value ? value : old; });
}

template <int Order, class T>
inline T exchange(T* p, T value, Scope scope) {
  detail::before_rmw<Order>(p, scope);
  T old;
  __atomic_exchange(p, &value, &old, Order);
  return detail::after_rmw<Order>(p, old);
}

template <int Order, class T>
inline T compare_exchange(T* p, T expected, T desired, Scope scope) {
  constexpr int kFailureOrder = has_acquire(Order) ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED;
  detail::before_rmw<Order>(p, scope);
  __atomic_compare_exchange(p, &expected, &desired, false, Order, kFailureOrder);
  return detail::after_rmw<Order>(p, expected);
}

}  // namespace simt
