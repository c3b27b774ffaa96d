// mbarriers, and the copies of the SM's copy engine.
#pragma once

#include "engine/simt.h"
#include "ptx/runtime/values.h"

namespace simt::ptx {

inline uint64_t* mbarrier_at(std::byte* pointer) {
  check_align(pointer, sizeof(uint64_t));
  return reinterpret_cast<uint64_t*>(pointer);
}

template <class A>
void mbarrier_init(std::byte* barrier, A count) {
  ::simt::mbarrier_init(mbarrier_at(barrier), as<u32>(count));
}
template <class A>
void mbarrier_arrive_expect_tx(Nobody, std::byte* barrier, A bytes) {
  ::simt::mbarrier_arrive(mbarrier_at(barrier), as<u32>(bytes));
}
template <class A>
void mbarrier_try_wait_parity(pred& d, std::byte* barrier, A parity) {
  d = ::simt::mbarrier_try_wait(mbarrier_at(barrier), as<u32>(parity));
}

template <class A>
void bulk_load(std::byte* to, const std::byte* from, A bytes, std::byte* barrier) {
  ::simt::bulk_load(to, from, as<u32>(bytes), mbarrier_at(barrier));
}
template <class A>
void bulk_store(std::byte* to, const std::byte* from, A bytes) {
  ::simt::bulk_store(to, from, as<u32>(bytes));
}
inline void bulk_commit_group() { ::simt::bulk_commit_group(); }
template <class A>
void bulk_wait_group(A most_pending) {
  ::simt::bulk_wait_group(as<u32>(most_pending), false);
}
template <class A>
void bulk_wait_group_read(A most_pending) {
  ::simt::bulk_wait_group(as<u32>(most_pending), true);
}
inline void fence_proxy_async() { ::simt::fence_proxy_async(); }

}  // namespace simt::ptx
