// Loads, stores, atomics and fences. What synchronises goes to the engine with its order and scope, as the
// accesses of dp:: do (../../device_primitives_host.h); the rest are plain accesses of C++, so that
// ThreadSanitizer sees a race where PTX has one.
#pragma once

#include <cstddef>

#include "engine/atomics.h"
#include "engine/simt.h"
#include "ptx/runtime/values.h"

namespace simt::ptx {

using ::simt::Scope;

// ---- addresses -------------------------------------------------------------------------------------------

// A generic or global address is the host's; one in shared memory is an offset into the block's.

inline std::byte* pointer(b64 address, s64 offset) {
  return reinterpret_cast<std::byte*>(address + static_cast<b64>(offset));
}
inline std::byte* shared_pointer(std::byte* window, b64 address, s64 offset) {
  return window + static_cast<u32>(address + static_cast<b64>(offset));
}
inline b64 shared_variable(const std::byte* window, const void* key, size_t bytes, size_t align) {
  return static_cast<b64>(static_cast<std::byte*>(shared_alloc(key, bytes, align)) - window);
}
template <class A>
void shared_to_generic(b64& d, A address, std::byte* window) {
  d = reinterpret_cast<b64>(shared_pointer(window, as<b64>(address), 0));
}
template <class A>
void generic_to_shared(b64& d, A address, const std::byte* window) {
  d = as<b64>(address) - reinterpret_cast<b64>(window);
}

// ---- weak accesses ---------------------------------------------------------------------------------------

/// What a weak access reads or writes at once.
template <class T, int kElements>
using Vector [[gnu::may_alias, gnu::vector_size(sizeof(T) * kElements)]] = T;

template <class T, int kElements, class P>
auto& vector_at(P* pointer) {
  if constexpr (sizeof(T) * kElements == 16) {
    note_vector(pointer, !std::is_const_v<P>);
  } else {
    check_align(pointer, sizeof(T) * kElements);
  }
  using Memory = std::conditional_t<std::is_const_v<P>, const Vector<T, kElements>, Vector<T, kElements>>;
  return *reinterpret_cast<Memory*>(pointer);
}

template <class T, class D>
void ld(D& d, const std::byte* pointer) {
  set(d, vector_at<BitsOf<T>, 1>(pointer)[0]);
}
template <class T, class... D>
void ld(const std::byte* pointer, D&... d) {
  const auto vector = vector_at<BitsOf<T>, sizeof...(D)>(pointer);
  int element = 0;
  (set(d, static_cast<BitsOf<T>>(vector[element++])), ...);
}
template <class T, class... A>
void st(std::byte* pointer, A... a) {
  constexpr int kElements = sizeof...(A);
  vector_at<BitsOf<T>, kElements>(pointer) = Vector<BitsOf<T>, kElements>{as<BitsOf<T>>(a)...};
}

// ---- accesses that synchronise ---------------------------------------------------------------------------

inline constexpr int relaxed = __ATOMIC_RELAXED;
inline constexpr int acquire = __ATOMIC_ACQUIRE;
inline constexpr int release = __ATOMIC_RELEASE;
inline constexpr int acq_rel = __ATOMIC_ACQ_REL;

template <class T>
BitsOf<T>* words(std::byte* pointer) {
  return reinterpret_cast<BitsOf<T>*>(pointer);
}

template <class T, int kOrder, Scope kScope, class D>
void ld_strong(D& d, std::byte* pointer) {
  set(d, load<kOrder>(words<T>(pointer), kScope));
}
template <class T, int kOrder, Scope kScope, class A>
void st_strong(std::byte* pointer, A a) {
  store<kOrder>(words<T>(pointer), as<BitsOf<T>>(a), kScope);
}
/// In two steps, in either order: a vector access is one access per element.
template <class T, int kOrder, Scope kScope, class A, class B>
void st_strong(std::byte* pointer, A first, B second) {
  check_align(pointer, 2 * sizeof(T));
  const bool in_order = random_bit();
  if (in_order) st_strong<T, kOrder, kScope>(pointer, first);
  st_strong<T, kOrder, kScope>(pointer + sizeof(T), second);
  if (!in_order) st_strong<T, kOrder, kScope>(pointer, first);
}

template <class T, int kOrder, Scope kScope, class D, class A>
void atom_add(D& d, std::byte* pointer, A a) {
  set(d, fetch_add<kOrder>(words<T>(pointer), as<T>(a), kScope));
}
template <class T, int kOrder, Scope kScope, class D, class A>
void atom_min(D& d, std::byte* pointer, A a) {
  set(d, fetch_min<kOrder>(words<T>(pointer), as<T>(a), kScope));
}
template <class T, int kOrder, Scope kScope, class D, class A>
void atom_max(D& d, std::byte* pointer, A a) {
  set(d, fetch_max<kOrder>(words<T>(pointer), as<T>(a), kScope));
}
template <class T, int kOrder, Scope kScope, class D, class A>
void atom_and(D& d, std::byte* pointer, A a) {
  set(d, fetch_and<kOrder>(words<T>(pointer), as<T>(a), kScope));
}
template <class T, int kOrder, Scope kScope, class D, class A>
void atom_or(D& d, std::byte* pointer, A a) {
  set(d, fetch_or<kOrder>(words<T>(pointer), as<T>(a), kScope));
}
template <class T, int kOrder, Scope kScope, class D, class A>
void atom_exch(D& d, std::byte* pointer, A a) {
  set(d, exchange<kOrder>(words<T>(pointer), as<T>(a), kScope));
}
template <class T, int kOrder, Scope kScope, class D, class A, class B>
void atom_cas(D& d, std::byte* pointer, A expected, B desired) {
  set(d, compare_exchange<kOrder>(words<T>(pointer), as<T>(expected), as<T>(desired), kScope));
}

template <int kOrder, Scope kScope>
void fence() {
  ::simt::fence(has_acquire(kOrder), has_release(kOrder), kScope);
}

}  // namespace simt::ptx
