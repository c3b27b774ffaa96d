// The CUDA spelling of everything that kernels may use unqualified: built-in variables, barriers,
// warp collectives, legacy atomics. Host build only; include after NVIDIA's own headers.
#pragma once

#include <math.h>

#include "engine/atomics.h"
#include "engine/simt.h"

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

#define threadIdx (::simt::cur().thread_idx)
#define blockIdx (::simt::cur().block_idx)
#define blockDim (::simt::cur().block_dim)
#define gridDim (::simt::cur().grid_dim)
static constexpr int warpSize = 32;

// ---- barriers, fences, pauses ------------------------------------------------------------------

inline void __syncthreads() { ::simt::block_barrier(0, 0); }
inline int __syncthreads_or(int predicate) { return ::simt::block_barrier(0, 0, false, predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) {
  return ::simt::block_barrier(0, 0, false, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::simt::warp_sync(mask); }
inline void __nanosleep(unsigned) { ::simt::spin_yield(); }
inline void __threadfence_block() { ::simt::fence(true, true, ::simt::Scope::cta); }
inline void __threadfence() { ::simt::fence(true, true, ::simt::Scope::gpu); }
inline void __threadfence_system() { ::simt::fence(true, true, ::simt::Scope::sys); }

// ---- shuffles ----------------------------------------------------------------------------------

namespace simt {

template <class T>
inline T shuffle_from(unsigned mask, T value, int source_lane) {
  const uint64_t* slots = warp_exchange(mask, WarpOp::shuffle, to_bits(value));
  if (!((mask >> source_lane) & 1)) {
    die("shfl reads lane %d which is not in mask %08x", source_lane, mask);
  }
  return from_bits<T>(slots[source_lane]);
}

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(::simt::cur().lane);
  return ::simt::shuffle_from(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(::simt::cur().lane);
  int source = lane ^ lane_mask;
  if ((source & ~(width - 1)) > (lane & ~(width - 1))) source = lane;
  return ::simt::shuffle_from(mask, value, source);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(::simt::cur().lane);
  int source = lane - static_cast<int>(delta);
  if (source < (lane & ~(width - 1))) source = lane;
  return ::simt::shuffle_from(mask, value, source);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(::simt::cur().lane);
  int source = lane + static_cast<int>(delta);
  if (source > (lane | (width - 1))) source = lane;
  return ::simt::shuffle_from(mask, value, source);
}

// ---- votes, matches, reductions ----------------------------------------------------------------

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* slots = ::simt::warp_exchange(mask, ::simt::WarpOp::vote, predicate != 0);
  mask &= ::simt::existing_lanes();
  unsigned result = 0;
  for (int i = 0; i < 32; i++) {
    if ((mask >> i & 1) && slots[i]) result |= 1u << i;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t bits = ::simt::to_bits(value);
  const uint64_t* slots = ::simt::warp_exchange(mask, ::simt::WarpOp::match, bits);
  mask &= ::simt::existing_lanes();
  unsigned result = 0;
  for (int i = 0; i < 32; i++) {
    if ((mask >> i & 1) && slots[i] == bits) result |= 1u << i;
  }
  return result;
}

namespace simt {

template <class T, class F>
inline T warp_reduce(unsigned mask, T value, F&& combine) {
  const uint64_t* slots = warp_exchange(mask, WarpOp::reduce, to_bits(value));
  mask &= existing_lanes();
  bool first = true;
  T result{};
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    const T lane_value = from_bits<T>(slots[i]);
    result = first ? lane_value : combine(result, lane_value);
    first = false;
  }
  return result;
}

}  // namespace simt

template <class T>
inline T __reduce_add_sync(unsigned mask, T value) {
  return ::simt::warp_reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return ::simt::warp_reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return ::simt::warp_reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}

inline unsigned __activemask() { ::simt::die("__activemask() depends on the schedule and is not allowed"); }

// ---- integer intrinsics and read-only loads ----------------------------------------------------

inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

// ---- arithmetic that is never contracted (build with -ffp-contract=off) --------------------------------

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned bits) { return ::simt::from_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(::simt::to_bits(value)); }

// ---- legacy atomics (relaxed, device scope) ----------------------------------------------------

template <class T, class U>
inline T atomicAdd(T* p, U value) {
  return ::simt::fetch_add<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
template <class T, class U>
inline T atomicMax(T* p, U value) {
  return ::simt::fetch_max<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
template <class T, class U>
inline T atomicMin(T* p, U value) {
  return ::simt::fetch_min<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
template <class T, class U>
inline T atomicOr(T* p, U value) {
  return ::simt::fetch_or<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
template <class T, class U>
inline T atomicAnd(T* p, U value) {
  return ::simt::fetch_and<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
template <class T, class U>
inline T atomicExch(T* p, U value) {
  return ::simt::exchange<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
template <class T, class U, class V>
inline T atomicCAS(T* p, U expected, V desired) {
  return ::simt::compare_exchange<__ATOMIC_RELAXED>(p, static_cast<T>(expected), static_cast<T>(desired),
                                                    ::simt::Scope::gpu);
}
