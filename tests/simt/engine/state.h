// Internal state of the engine. Device code never sees this header.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/sanitizer_glue.h"
#include "engine/simt.h"

namespace simt {

constexpr int kNamedBarriers = 16;
constexpr uint32_t kWarpGroups = 8;                // distinct lane masks per warp
constexpr size_t kSharedMemoryLimit = 227 * 1024;  // per block
constexpr size_t kRedZone = 16;                    // poisoned bytes between shared variables
constexpr size_t kArenaBytes = kSharedMemoryLimit + 32 * 1024;

struct Worker;
struct Launch;

// ---- one CUDA thread ---------------------------------------------------------------------------

enum class FiberState : uint8_t { fresh, runnable, waiting, done };

// A thread's groups of bulk stores: how many of each have not read, or not written.
struct BulkGroup {
  int unread = 0, unwritten = 0;
};
struct BulkGroups {
  uint32_t open = 0;
  std::map<uint32_t, BulkGroup> pending;
  SyncPoint all_read, all_written;
};

// Clocks for standalone fences, each held by a TSan fiber of its own (see memory_order.cpp).
struct FenceClocks {
  void* release_gpu = nullptr;
  void* release_sys = nullptr;
  void* loaded = nullptr;
  SyncPoint mailbox;
};

struct Fiber {
  void* sp = nullptr;
  CudaThread self{};
  FiberState state = FiberState::fresh;
  char* stack = nullptr;
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
  const char* waiting_for = "";
  // Polling detector: the last synchronising load, and how many there were since the last yield.
  const void* polled_address = nullptr;
  uint64_t polled_value = 0;
  uint32_t loads_since_yield = 0;
  std::unique_ptr<BulkGroups> bulk;
  std::unique_ptr<FenceClocks> fences;
};

// ---- rendezvous --------------------------------------------------------------------------------

// One per distinct lane mask of a warp. Slots are double buffered by generation: all lanes of a
// group must arrive for generation n+1 before generation n+2 can overwrite generation n.
struct WarpGroup {
  uint32_t mask = 0;
  uint32_t arrived = 0;   // lanes waiting in the current generation
  uint32_t resuming = 0;  // lanes released by the previous generation that have not run yet
  uint32_t generation = 0;
  WarpOp op = WarpOp::sync;
  uint64_t slots[2][32];
  SyncPoint order[2];
};

struct Warp {
  uint32_t live = 0;
  uint32_t num_groups = 0;
  WarpGroup groups[kWarpGroups];
};

struct NamedBarrier {
  int arrived = 0;
  int expected = 0;  // 0: all live threads
  uint32_t generation = 0;
  int votes[2] = {};  // by generation
  SyncPoint order[2];
  std::vector<uint32_t> waiting;
};

// ---- async proxy (see async_copy.cpp) ----------------------------------------------------------

struct MBarrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t expected_bytes = 0;
  SyncPoint order[2] = {};
};

struct BulkCopy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* mbarrier = nullptr;  // null for stores, which complete through a group
  uint32_t issuer = 0, group = 0;
  std::vector<std::byte> read = {};  // what a store has read
};

struct AsyncProxy {
  Fiber fiber;
  std::deque<BulkCopy> queue;
  std::unordered_map<uint64_t*, MBarrier> mbarriers;
  SyncPoint fences;
};

// ---- blocks, launches, streams, workers --------------------------------------------------------

struct SharedMemory {
  std::unique_ptr<std::byte[]> arena;
  size_t offset = 0, used = 0;
  std::vector<std::pair<const void*, void*>> variables;
};

struct Block {
  Launch* launch = nullptr;
  Worker* worker = nullptr;
  uint32_t num_threads = 0, num_warps = 0, num_live = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint32_t> runnable;  // per warp, one bit per lane
  NamedBarrier barriers[kNamedBarriers];
  SharedMemory shared;
  AsyncProxy async;
  uint32_t next = 0;             // where the round robin goes on
  uint32_t spins = 0;            // yields by polling threads since something else happened
  uint32_t spins_this_turn = 0;  // since other blocks ran
  bool progress = false;
};

struct Launch {
  std::function<void()> body;
  dim3 grid, block;
  const char* name = "";
  Stream* stream = nullptr;
  uint64_t next_block = 0, num_blocks = 0, done = 0;
  SyncPoint start, finished;
  SyncPoint* previous_finished = nullptr;  // of the launch before this one on the stream
  std::vector<Block*> graveyard;           // see finish_block()
};

struct Graph {
  struct Node {
    dim3 grid, block;
    std::function<void()> body;
    const char* name;
  };
  std::vector<Node> nodes;
};

struct Stream {
  int device, max_resident_blocks;
  std::deque<std::unique_ptr<Launch>> queue;
  std::vector<std::unique_ptr<Launch>> finished;
  std::unique_ptr<Graph> capture;  // what launches are recorded into instead of being run
};

struct Worker {
  int id = 0;
  std::vector<Block*> active;
  std::deque<Block*> inbox;  // guarded by g_mutex
  void* main_sp = nullptr;
  void* main_tsan_fiber = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  std::atomic<Fiber*> running{nullptr};
  std::atomic<uint64_t> switches{0};
  std::atomic<int> load{0};
  uint64_t rng_state = 1;
  std::thread thread;
  std::vector<char*> stack_pool;
  uint64_t system_releases = 0;

  uint64_t random() {  // xorshift64
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return rng_state;
  }
};

extern Config g_config;
extern std::mutex g_mutex;  // guards streams, launches and worker inboxes
extern std::vector<std::unique_ptr<Worker>> g_workers;

// ---- internal functions ------------------------------------------------------------------------

inline Block* current_block() { return tls_thread->block; }
inline Fiber* current_fiber() { return current_block()->worker->running.load(std::memory_order_relaxed); }

// scheduler.cpp
enum class Yield : uint8_t { blocked, spinning, preempted };
void switch_to(Worker* w, Fiber* from, Fiber* to, bool dying = false);  // null: the worker itself
void reschedule(Block* b, Fiber* me, Yield reason);
void run_fiber(Worker* w, Block* b, Fiber* from, uint32_t index, bool dying = false);
int pick_runnable(Block* b, uint32_t start);  // next runnable thread at or after start, or -1
void prepare_block(Worker* w, Block* b);
void note_poll(const void* p, uint64_t value);
size_t stack_bytes();
inline void set_runnable(Block* b, uint32_t i) {
  b->fibers[i].state = FiberState::runnable;
  b->runnable[i / 32] |= 1u << (i % 32);
}
inline void clear_runnable(Block* b, uint32_t i, FiberState state) {
  b->fibers[i].state = state;
  b->runnable[i / 32] &= ~(1u << (i % 32));
}
inline void mark_progress(Block* b) {
  b->spins = 0;
  b->progress = true;
}

// block_barrier.cpp, warp_collectives.cpp, memory_order.cpp, shared_memory.cpp
void barriers_thread_exit(Block* b);
void warps_thread_exit(Block* b, uint32_t thread);
void destroy_fence_clocks(Fiber* f);
void release_shared_memory(Block* b);

// async_copy.cpp
[[noreturn]] void async_proxy_main(Block* b);

// diagnostics.cpp
void dump_block(const Block* b);
void dump_workers();

}  // namespace simt
