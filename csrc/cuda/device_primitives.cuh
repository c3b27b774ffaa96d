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
//   ld_acquire_{gpu,sys}, ld_relaxed_{gpu,sys}, st_release_sys, st_relaxed_{gpu,sys}
//   st_relaxed_sys_v2                  two adjacent 64-bit words with one store
//   atom_add_gpu, atom_cas_gpu         relaxed
//   atom_add_acq_rel_gpu
//   fence_{release,acquire}_sys        a release fence followed by relaxed stores is a release pattern for
//                                      each of them; relaxed loads followed by an acquire fence likewise
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

DP_DEFINE_LOAD(ld_acquire_gpu, "acquire.gpu")
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
