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
#define gridDim (::simt::cur().grid_dim)

// ---- barriers, fences, pauses ------------------------------------------------------------------

inline void __syncthreads() { ::simt::block_barrier(0, 0); }
inline int __syncthreads_or(int predicate) { return ::simt::block_barrier(0, 0, false, predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) {
  return ::simt::block_barrier(0, 0, false, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::simt::warp_sync(mask); }
inline void __nanosleep(unsigned) { ::simt::spin_yield(); }

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

// ---- votes and matches -------------------------------------------------------------------------

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

inline unsigned __activemask() { ::simt::die("__activemask() depends on the schedule and is not allowed"); }

// ---- integer intrinsics ------------------------------------------------------------------------

inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

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
inline T atomicOr(T* p, U value) {
  return ::simt::fetch_or<__ATOMIC_RELAXED>(p, static_cast<T>(value), ::simt::Scope::gpu);
}
