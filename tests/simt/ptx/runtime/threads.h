// Barriers, warps, time and ends.
#pragma once

#include "engine/cuda_spelling.h"
#include "engine/simt.h"
#include "ptx/runtime/values.h"

namespace simt::ptx {

[[noreturn]] inline void trap() { die("trap"); }
template <class A>
void nanosleep(A) {
  spin_yield();
}

// ---- barriers of the block -------------------------------------------------------------------------------

template <class A>
void barrier_sync(A id) {
  block_barrier(as<s32>(id), 0);
}
template <class A, class B>
void barrier_sync(A id, B threads) {
  block_barrier(as<s32>(id), as<s32>(threads));
}
template <class A, class B>
void barrier_arrive(A id, B threads) {
  block_barrier(as<s32>(id), as<s32>(threads), true);
}
template <class A>
void barrier_or(pred& d, A id, pred vote) {
  d = block_barrier(as<s32>(id), 0, false, vote) != 0;
}
template <class A>
void barrier_and(pred& d, A id, pred vote) {
  d = block_barrier(as<s32>(id), 0, false, !vote) == 0;
}

// ---- warps -----------------------------------------------------------------------------------------------

template <class M>
void warp_sync(M mask) {
  ::simt::warp_sync(as<u32>(mask));
}
template <class M>
void vote_ballot(b32& d, pred vote, M mask) {
  d = __ballot_sync(as<u32>(mask), vote);
}
template <class M>
void vote_any(pred& d, pred vote, M mask) {
  d = __any_sync(as<u32>(mask), vote) != 0;
}
template <class M>
void vote_all(pred& d, pred vote, M mask) {
  d = __all_sync(as<u32>(mask), vote) != 0;
}
template <class T, class A, class M>
void match_any(b32& d, A a, M mask) {
  d = __match_any_sync(as<u32>(mask), as<T>(a));
}

enum class Shuffle { up, down, bfly, idx };

/// As the ISA defines it: `clamp` holds the last lane that may be read, in bits 0 to 4, and in bits 8 to 12
/// the lane's bits that stay. A lane beyond gives the own value, and false in `d_valid`.
template <Shuffle kMode, class A, class B, class C, class M>
void shfl(b32& d, pred& d_valid, A value, B operand, C clamp, M mask) {
  const u32 lane = cur().lane;
  const u32 b = as<u32>(operand) & 31;
  const u32 fixed = as<u32>(clamp) >> 8 & 31;
  const u32 last = (lane & fixed) | (as<u32>(clamp) & 31 & ~fixed);
  u32 source = 0;
  bool valid = false;
  if constexpr (kMode == Shuffle::up) {
    source = lane - b;
    valid = static_cast<s32>(source) >= static_cast<s32>(last);
  } else {
    source = kMode == Shuffle::down   ? lane + b
             : kMode == Shuffle::bfly ? lane ^ b
                                      : (lane & fixed) | (b & ~fixed);
    valid = source <= last;
  }
  d = shuffle_from(as<u32>(mask), as<b32>(value), static_cast<int>(valid ? source : lane));
  d_valid = valid;
}
template <Shuffle kMode, class A, class B, class C, class M>
void shfl(b32& d, A value, B operand, C clamp, M mask) {
  pred valid = false;
  shfl<kMode>(d, valid, value, operand, clamp, mask);
}

}  // namespace simt::ptx
