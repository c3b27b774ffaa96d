// The twin of csrc/cuda/device_primitives.cuh for CPU fibers. Include that file instead of this one.
#pragma once

#include "engine/atomics.h"
#include "engine/cuda_spelling.h"
#include "engine/simt.h"

#define DP_DEVICE inline
#define DP_BULK_COPIES 1
#define DP_SHARED(T, name)             \
  static const char dp_key_##name = 0; \
  T& name = *static_cast<T*>(::simt::shared_alloc(&dp_key_##name, sizeof(T), alignof(T)))
#define DP_SHARED_ARRAY(T, name, n)    \
  static const char dp_key_##name = 0; \
  T(&name)                             \
  [n] = *static_cast<T(*)[n]>(::simt::shared_alloc(&dp_key_##name, sizeof(T[n]), alignof(T)))
// A stream here is the engine's, under the name that CUDA's has.
#define DP_LAUNCH(kernel, grid, block, smem, stream, ...)                               \
  ::simt::launch(kernel, grid, block, smem, reinterpret_cast<::simt::stream_t>(stream), \
                 #kernel __VA_OPT__(, ) __VA_ARGS__)

namespace dp {

using ::simt::Scope;

inline uint4 ld_nc(const void* p) {
  ::simt::note_vector(p, false);
  return *static_cast<const uint4*>(p);
}
inline uint4 ld_na(const void* p) { return ld_nc(p); }
inline void st_na(void* p, uint4 v) {
  ::simt::note_vector(p, true);
  *static_cast<uint4*>(p) = v;
}

template <class T>
T ld_acquire_gpu(const T* p) {
  return ::simt::load<__ATOMIC_ACQUIRE>(p, Scope::gpu);
}
template <class T>
T ld_acquire_sys(const T* p) {
  return ::simt::load<__ATOMIC_ACQUIRE>(p, Scope::sys);
}
template <class T>
T ld_relaxed_gpu(const T* p) {
  return ::simt::load<__ATOMIC_RELAXED>(p, Scope::gpu);
}
template <class T>
T ld_relaxed_sys(const T* p) {
  return ::simt::load<__ATOMIC_RELAXED>(p, Scope::sys);
}
template <class T>
void st_release_sys(T* p, std::type_identity_t<T> v) {
  ::simt::store<__ATOMIC_RELEASE>(p, v, Scope::sys);
}
template <class T>
void st_relaxed_gpu(T* p, std::type_identity_t<T> v) {
  ::simt::store<__ATOMIC_RELAXED>(p, v, Scope::gpu);
}
template <class T>
void st_relaxed_sys(T* p, std::type_identity_t<T> v) {
  ::simt::store<__ATOMIC_RELAXED>(p, v, Scope::sys);
}
template <class T>
T atom_add_gpu(T* p, std::type_identity_t<T> v) {
  return ::simt::fetch_add<__ATOMIC_RELAXED>(p, v, Scope::gpu);
}
template <class T>
T atom_add_acq_rel_gpu(T* p, std::type_identity_t<T> v) {
  return ::simt::fetch_add<__ATOMIC_ACQ_REL>(p, v, Scope::gpu);
}
inline void red_max_gpu(uint64_t* p, uint64_t v) { ::simt::fetch_max<__ATOMIC_RELAXED>(p, v, Scope::gpu); }
inline uint32_t atom_cas_gpu(uint32_t* p, uint32_t expected, uint32_t desired) {
  return ::simt::compare_exchange<__ATOMIC_RELAXED>(p, expected, desired, Scope::gpu);
}
// In two steps, in either order: nothing says that the words become visible at once.
inline void st_relaxed_sys_v2(uint64_t* p, uint64_t first, uint64_t second) {
  ::simt::check_align(p, 16);
  const bool first_word_first = ::simt::random_bit();
  if (first_word_first) ::simt::store<__ATOMIC_RELAXED>(p, first, Scope::sys);
  ::simt::store<__ATOMIC_RELAXED>(p + 1, second, Scope::sys);
  if (!first_word_first) ::simt::store<__ATOMIC_RELAXED>(p, first, Scope::sys);
}
inline void fence_release_sys() { ::simt::fence(false, true, Scope::sys); }
inline void fence_acquire_sys() { ::simt::fence(true, false, Scope::sys); }

inline void mbarrier_init(uint64_t* barrier, uint32_t count) { ::simt::mbarrier_init(barrier, count); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  ::simt::mbarrier_arrive(barrier, bytes);
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  return ::simt::mbarrier_try_wait(barrier, parity);
}
inline void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  ::simt::bulk_load(to_shared, from, bytes, barrier);
}
inline void bulk_store(void* to, const void* from_shared, uint32_t bytes) {
  ::simt::bulk_store(to, from_shared, bytes);
}
inline void bulk_commit_group() { ::simt::bulk_commit_group(); }
template <int kPending>
void bulk_wait_group() {
  ::simt::bulk_wait_group(kPending, false);
}
template <int kPending>
void bulk_wait_group_read() {
  ::simt::bulk_wait_group(kPending, true);
}
inline void fence_proxy_async() { ::simt::fence_proxy_async(); }

inline void spin_pause() { ::simt::spin_yield(); }
inline uint64_t global_timer() { return ::simt::global_timer(); }

}  // namespace dp
