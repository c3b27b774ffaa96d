// Device primitives: everything in a kernel that has a scope, an order, a cache hint, or a PTX spelling of
// its own. Kernels use plain CUDA for indices, __syncthreads, __syncwarp, shuffles, votes and shared atomics,
// and dp:: for the rest. This is the only file with PTX.
//
// Any compiler but nvcc gets the twin that runs on CPU fibers (tests/simt/device_primitives_host.h), with the
// same functions and macros:
//
//   DP_DEVICE                          qualifier of device functions
//   DP_SHARED(T, name)                 a block-shared variable
//   DP_SHARED_ARRAY(T, name, n)        a block-shared array
//   DP_LAUNCH(kernel, grid, block, smem, stream, args...)
//
//   ld_nc, ld_na, st_na                16-byte accesses that do not stay in L1; ld_nc only for data that
//                                      nobody writes while the kernel runs
//   ld_acquire_sys, ld_relaxed_{gpu,sys}, st_release_sys, st_relaxed_{gpu,sys}
//   st_relaxed_sys_v2                  two adjacent 64-bit words with one store
//   atom_add_gpu, atom_cas_gpu         relaxed
//   red_max_gpu                        relaxed, without the old value
//   atom_add_acq_rel_gpu
//   fence_{release,acquire}_sys        a release fence followed by relaxed stores is a release pattern for
//                                      each of them; relaxed loads followed by an acquire fence likewise
//   DP_BULK_COPIES                     whether the SM's copy engine can be asked (sm_90 on); then, for units
//                                      of 16 bytes, aligned so:
//   mbarrier_{init,arrive_expect_tx,try_wait}, bulk_load, bulk_store, bulk_commit_group,
//   bulk_wait_group, bulk_wait_group_read
//   fence_proxy_async                  before the copy engine reads what the thread has written or acquired
//   spin_pause()                       body of every polling loop
//   global_timer()                     nanoseconds; the same clock on all SMs
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define DP_DEVICE __device__ __forceinline__
#define DP_SHARED(T, name) __shared__ T name
#define DP_SHARED_ARRAY(T, name, n) __shared__ T name[n]
#define DP_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)

namespace dp {

// ---- 16-byte accesses with cache hints -----------------------------------------------------------------

DP_DEVICE uint4 ld_nc(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
DP_DEVICE uint4 ld_na(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
DP_DEVICE void st_na(void* p, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- ordered accesses ----------------------------------------------------------------------------------

#define DP_DEFINE_LOAD(name, qualifiers)                                                  \
  DP_DEVICE uint32_t name(const uint32_t* p) {                                            \
    uint32_t v;                                                                           \
    asm volatile("ld." qualifiers ".global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); \
    return v;                                                                             \
  }                                                                                       \
  DP_DEVICE uint64_t name(const uint64_t* p) {                                            \
    uint64_t v;                                                                           \
    asm volatile("ld." qualifiers ".global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"); \
    return v;                                                                             \
  }
#define DP_DEFINE_STORE(name, qualifiers)                                               \
  DP_DEVICE void name(uint32_t* p, uint32_t v) {                                        \
    asm volatile("st." qualifiers ".global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); \
  }                                                                                     \
  DP_DEVICE void name(uint64_t* p, uint64_t v) {                                        \
    asm volatile("st." qualifiers ".global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); \
  }
#define DP_DEFINE_ADD(name, qualifiers)                             \
  DP_DEVICE uint32_t name(uint32_t* p, uint32_t v) {                \
    uint32_t old;                                                   \
    asm volatile("atom." qualifiers ".global.add.u32 %0, [%1], %2;" \
                 : "=r"(old)                                        \
                 : "l"(p), "r"(v)                                   \
                 : "memory");                                       \
    return old;                                                     \
  }                                                                 \
  DP_DEVICE uint64_t name(uint64_t* p, uint64_t v) {                \
    uint64_t old;                                                   \
    asm volatile("atom." qualifiers ".global.add.u64 %0, [%1], %2;" \
                 : "=l"(old)                                        \
                 : "l"(p), "l"(v)                                   \
                 : "memory");                                       \
    return old;                                                     \
  }

DP_DEFINE_LOAD(ld_acquire_sys, "acquire.sys")
DP_DEFINE_LOAD(ld_relaxed_gpu, "relaxed.gpu")
DP_DEFINE_LOAD(ld_relaxed_sys, "relaxed.sys")
DP_DEFINE_STORE(st_release_sys, "release.sys")
DP_DEFINE_STORE(st_relaxed_gpu, "relaxed.gpu")
DP_DEFINE_STORE(st_relaxed_sys, "relaxed.sys")
DP_DEFINE_ADD(atom_add_gpu, "relaxed.gpu")
DP_DEFINE_ADD(atom_add_acq_rel_gpu, "acq_rel.gpu")

#undef DP_DEFINE_LOAD
#undef DP_DEFINE_STORE
#undef DP_DEFINE_ADD

DP_DEVICE void red_max_gpu(uint64_t* p, uint64_t v) {
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DP_DEVICE uint32_t atom_cas_gpu(uint32_t* p, uint32_t expected, uint32_t desired) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(p), "r"(expected), "r"(desired)
               : "memory");
  return old;
}
DP_DEVICE void st_relaxed_sys_v2(uint64_t* p, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1,%2};" ::"l"(p), "l"(first), "l"(second) : "memory");
}
// From sm_90 on there are fences of one side. An acquire does not wait there for the SM's writes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
DP_DEVICE void fence_release_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
DP_DEVICE void fence_acquire_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
#else
DP_DEVICE void fence_release_sys() { asm volatile("fence.release.sys;" ::: "memory"); }
DP_DEVICE void fence_acquire_sys() { asm volatile("fence.acquire.sys;" ::: "memory"); }
#endif

// ---- the SM's copy engine ------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DP_BULK_COPIES 1

DP_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

DP_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
DP_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
/// Whether the phase of this parity has ended; after some time it says no, too.
DP_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred %%ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 %%ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, %%ended;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

DP_DEVICE void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to_shared)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
DP_DEVICE void bulk_store(void* to, const void* from_shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from_shared)), "r"(bytes)
               : "memory");
}
DP_DEVICE void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Waits until all groups of this thread but the last `kPending` are complete, or have read what they copy.
template <int kPending>
DP_DEVICE void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
DP_DEVICE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
DP_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

#else
#define DP_BULK_COPIES 0
#endif

// ---- time ----------------------------------------------------------------------------------------------

DP_DEVICE void spin_pause() { __nanosleep(64); }
DP_DEVICE uint64_t global_timer() {
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
  return nanoseconds;
}

}  // namespace dp

#else
#include "device_primitives_host.h"
#endif
