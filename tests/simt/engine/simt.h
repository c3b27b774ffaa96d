// Host execution of CUDA-style kernels: one fiber per CUDA thread.
//
// This header is what host code (tests, bindings) and the device-side headers see of the engine.
// It is split in two: the functions that kernel code reaches through engine/cuda_spelling.h and
// device_primitives_host.h, and the small launch API used by host code.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

#include "engine/ptx_registry.h"

namespace simt {

struct Block;
struct Stream;
using stream_t = Stream*;

// ------------------------------------------------------------------------------------------------
// State of the running CUDA thread
// ------------------------------------------------------------------------------------------------

struct CudaThread {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  uint32_t linear;  // thread index within the block, x fastest
  uint32_t lane, warp;
  int device;  // rank given to stream_create()
  Block* block;
};

// Null outside of kernels. Blocks never migrate between OS threads, so caching the TLS address
// across a fiber switch is harmless.
extern thread_local CudaThread* tls_thread __attribute__((tls_model("initial-exec")));
inline CudaThread& cur() { return *tls_thread; }
inline bool in_kernel() { return tls_thread != nullptr; }

// Lanes of the calling thread's warp that exist (the last warp of a block may be partial).
inline uint32_t existing_lanes() {
  const CudaThread& t = cur();
  const uint32_t threads = t.block_dim.x * t.block_dim.y * t.block_dim.z;
  const uint32_t in_warp = threads - t.warp * 32;
  return in_warp >= 32 ? 0xffffffffu : (1u << in_warp) - 1;
}

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ------------------------------------------------------------------------------------------------
// Engine entry points used by device code
// ------------------------------------------------------------------------------------------------

// Scheduling.
void spin_yield();     // a polling thread lets others run
void preempt_point();  // random preemption when Config::chaos is set, otherwise nothing
void told_others();    // then also: they may act on it before the kernel does anything else

bool random_bit();  // false without chaos

// Nanoseconds that pass with the work that this process gets done, so that a deadline does not pass because
// the machine is busy with something else.
uint64_t global_timer();

// Barriers. threads == 0 means "all live threads of the block".
// Returns how many threads voted.
int block_barrier(int id, int threads, bool arrive_only = false, bool vote = false);

// Warp collectives. Every lane named in the mask must arrive with the same operation.
enum class WarpOp : uint32_t { sync = 1, shuffle, vote, match };
// Exchanges 64 bits per lane; gives no memory ordering (as in PTX). The result has 32 slots and is
// valid until the calling thread's next engine call.
const uint64_t* warp_exchange(uint32_t mask, WarpOp op, uint64_t value);
void warp_sync(uint32_t mask);  // __syncwarp: rendezvous with memory ordering

// Block-shared memory. `key` identifies the declaration, so that every thread gets the same bytes.
void* shared_alloc(const void* key, size_t bytes, size_t align);
std::byte* shared_window();  // where the block's shared memory starts
bool is_shared(const void* p);

// Async proxy. Waits let others run; `most_pending` are the groups that may still be under way.
void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity);
void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* to, const void* from_shared, uint32_t bytes);
void bulk_commit_group();
void bulk_wait_group(uint32_t most_pending, bool read_only);
void fence_proxy_async();

// Memory order. The templates in engine/atomics.h are the callers.
enum class Scope : uint8_t { cta, gpu, sys };
void check_scope(const void* p, Scope scope);  // dies on a too narrow scope
void note_load(const void* p, uint64_t value, bool relaxed);
void note_relaxed_store(const void* p);
void note_release(Scope scope);
void fence(bool acquire, bool release, Scope scope);

inline void check_align(const void* p, size_t align) {
  if (__builtin_expect((reinterpret_cast<uintptr_t>(p) & (align - 1)) != 0, 0)) {
    die("misaligned %zu-byte access at %p", align, p);
  }
}

// 16-byte accesses to global memory, for tests that count bytes. The observer is called by several threads at
// once.
using VectorObserver = void (*)(const void* p, bool write);
extern VectorObserver g_vector_observer;
inline void note_vector(const void* p, bool write) {
  check_align(p, 16);
  if (__builtin_expect(g_vector_observer != nullptr, 0) && !is_shared(p)) g_vector_observer(p, write);
}

// ------------------------------------------------------------------------------------------------
// Launch API used by host code
// ------------------------------------------------------------------------------------------------

// The environment variables SIMT_WORKERS, SIMT_SEED, SIMT_CHAOS and SIMT_HANG override the fields.
struct Config {
  int workers = 0;           // OS threads; 0: one per CPU; -1: run inside stream_sync (deterministic)
  uint64_t seed = 0;         // of the schedule fuzzer
  int chaos = 0;             // preempt at one in `chaos` synchronising accesses; 0: never
  double hang_seconds = 20;  // without progress before the engine reports a hang and aborts
};
void configure(const Config& config);  // before the first launch

// Streams are in-order queues. max_resident_blocks caps co-resident blocks per launch (0: no cap)
// and so finds kernels that silently assume that the whole grid is resident.
stream_t stream_create(int device, int max_resident_blocks = 0);
void stream_sync(stream_t stream);
bool stream_idle(stream_t stream);  // whether stream_sync() would return at once
void launch_raw(stream_t stream, dim3 grid, dim3 block, std::function<void()> body, const char* name);

// Graphs: launches into a stream between begin and end are recorded with their arguments, and not run.
// graph_launch() runs them in any stream, as often as it is asked, with these very arguments.
struct Graph;
void capture_begin(stream_t stream);
std::shared_ptr<Graph> capture_end(stream_t stream);
size_t graph_size(const Graph& graph);
void graph_launch(const Graph& graph, stream_t stream);

// For OS threads that exchange data with kernels (CPU proxies, fake network cards) in TSan builds:
// call it after reading a command and before touching the data. Without it TSan may drop the
// thread's races when more than about 250 CUDA threads are alive (see sanitizer_glue.h). No
// ordering.
void host_thread_checkpoint();

uint64_t system_releases();  // by kernels so far: release stores, read-modify-writes and fences

void observe_vectors(VectorObserver observer);  // null: nobody. While no kernel runs.

// Registers memory with its owner. Synchronising on registered memory of another device, on host
// memory, or on what others write, with less than system scope is then a fatal error. Where ranges
// overlap, the first one counts.
enum class MemoryKind : uint8_t { device, host, written_by_others };
// While no kernel runs.
void register_range(const void* p, size_t bytes, MemoryKind kind, int device);
void unregister_ranges(int device);

// Launches a kernel function. When translated PTX kernels are linked into the program (see ../ptx),
// the PTX version of the same kernel runs instead.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dyn_smem, stream_t stream,
            const char* name, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "wrong number of kernel arguments");
  if (dyn_smem != 0) die("%s: dynamic shared memory is not emulated", name);
  if (ptx::registered() > 0) {
    ptx::ParamPack pack;
    (pack.add(static_cast<std::decay_t<Params>>(std::forward<Args>(args))), ...);
    ptx::Body body = ptx::bind(reinterpret_cast<ptx::HostKernel>(kernel), name, std::move(pack),
                               block.x * block.y * block.z);
    launch_raw(stream, grid, block, std::move(body), name);
  } else {
    auto body = [kernel, ... values = static_cast<std::decay_t<Params>>(std::forward<Args>(args))]() {
      kernel(values...);
    };
    launch_raw(stream, grid, block, std::move(body), name);
  }
}

}  // namespace simt
