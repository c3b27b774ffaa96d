// Host side of the engine: worker threads, streams, launches, hang detection.
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "engine/fiber_switch.h"
#include "engine/state.h"

namespace simt {

const bool g_tsan = &__tsan_create_fiber != nullptr;
const bool g_asan = &__asan_unpoison_memory_region != nullptr;
SyncPoint g_tsan_anchor;
VectorObserver g_vector_observer = nullptr;
Config g_config;
std::mutex g_mutex;
std::vector<std::unique_ptr<Worker>> g_workers;

namespace {

using Clock = std::chrono::steady_clock;

std::condition_variable g_work_available, g_launch_done;
std::atomic<uint64_t> g_progress{0};
bool g_stop = false;
bool g_configured = false;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// ---- blocks ------------------------------------------------------------------------------------

uint3 unflatten(uint64_t i, const dim3& extent) {
  return make_uint3(static_cast<unsigned>(i % extent.x), static_cast<unsigned>(i / extent.x % extent.y),
                    static_cast<unsigned>(i / extent.x / extent.y));
}

Block* make_block(Launch* launch, uint64_t index) {
  Block* b = new Block;
  b->launch = launch;
  b->num_threads = b->num_live = launch->block.x * launch->block.y * launch->block.z;
  b->num_warps = (b->num_threads + 31) / 32;
  b->fibers.resize(b->num_threads);
  b->warps.resize(b->num_warps);
  b->runnable.resize(b->num_warps);
  for (uint32_t i = 0; i < b->num_threads; i++) {
    CudaThread& t = b->fibers[i].self;
    t.thread_idx = unflatten(i, launch->block);
    t.block_idx = unflatten(index, launch->grid);
    t.block_dim = launch->block;
    t.grid_dim = launch->grid;
    t.linear = i;
    t.lane = i % 32;
    t.warp = i / 32;
    t.device = launch->stream->device;
    t.block = b;
    b->warps[i / 32].live |= 1u << (i % 32);
    b->runnable[i / 32] |= 1u << (i % 32);
  }
  for (NamedBarrier& barrier : b->barriers) barrier.waiting.reserve(b->num_threads);
  b->async.fiber.self = b->fibers[0].self;
  b->async.fiber.state = FiberState::runnable;
  return b;
}

template <class Action>
void for_each_fiber(Block* b, Action action) {
  for (Fiber& f : b->fibers) action(f);
  action(b->async.fiber);
}

void delete_block(Block* b) {
  if (g_tsan) for_each_fiber(b, [](Fiber& f) { unmap_stack(f.stack, stack_bytes()); });
  release_shared_memory(b);
  delete b;
}

// Hands out blocks of the stream's first launch, as far as residency allows.
void dispatch_locked(Stream* s) {
  if (s->queue.empty()) return;
  Launch* launch = s->queue.front().get();
  const uint64_t limit =
      s->max_resident_blocks ? static_cast<uint64_t>(s->max_resident_blocks) : ~uint64_t{0};
  while (launch->next_block < launch->num_blocks && launch->next_block - launch->done < limit) {
    auto least_loaded = std::min_element(g_workers.begin(), g_workers.end(),
                                         [](const auto& x, const auto& y) { return x->load < y->load; });
    Worker* w = least_loaded->get();
    Block* b = make_block(launch, launch->next_block++);
    b->worker = w;
    w->load++;
    w->inbox.push_back(b);
  }
  g_work_available.notify_all();
}

// Under TSan the block's memory is kept until the host has synchronised with the launch: recycled
// stacks and arenas would otherwise look like races between unrelated threads.
void finish_block(Worker* w, Block* b) {
  Launch* launch = b->launch;
  if (!b->async.queue.empty()) {
    die("a block of %s ended with %zu bulk copies under way", launch->name, b->async.queue.size());
  }
  if (g_tsan) {
    for_each_fiber(b, [](Fiber& f) {
      destroy_fence_clocks(&f);
      __tsan_destroy_fiber(f.tsan_fiber);
    });
  } else {
    for_each_fiber(b, [w](Fiber& f) { w->stack_pool.push_back(f.stack); });
    delete_block(b);
  }

  const EngineLock lock(g_mutex);
  if (g_tsan) launch->graveyard.push_back(b);
  w->load--;
  launch->done++;
  Stream* s = launch->stream;
  if (launch->done == launch->num_blocks) {
    s->finished.push_back(std::move(s->queue.front()));
    s->queue.pop_front();
    if (!s->queue.empty()) s->queue.front()->previous_finished = &launch->finished;
    g_launch_done.notify_all();
  }
  dispatch_locked(s);
}

// ---- workers -----------------------------------------------------------------------------------

struct IdleState {
  int rounds = 0;
  Clock::time_point since;
  uint64_t progress_seen = 0;
};

void report_deadlock(const Block* b) {
  fprintf(stderr, "simt: DEADLOCK: no thread of the block can run\n");
  dump_block(b);
  abort();
}

void wait_a_little(int rounds) {
  if (rounds < 64) {
    sched_yield();
  } else {
    const timespec pause{0, 20000};
    nanosleep(&pause, nullptr);
  }
}

// One round over the worker's blocks: each runs until all its threads wait or poll.
void run_round(Worker* w, IdleState* idle) {
  bool any_progress = false;
  if (g_config.chaos) {
    for (size_t i = w->active.size(); i > 1; i--) {
      std::swap(w->active[i - 1], w->active[w->random() % i]);
    }
  }
  for (size_t k = 0; k < w->active.size();) {
    Block* b = w->active[k];
    b->progress = false;
    if (!b->fibers[0].sp) prepare_block(w, b);
    const int i = pick_runnable(b, b->next);
    if (i >= 0) {
      run_fiber(w, b, nullptr, static_cast<uint32_t>(i));
    } else if (!b->async.queue.empty() && b->num_live) {
      switch_to(w, nullptr, &b->async.fiber);
    } else if (b->num_live) {
      report_deadlock(b);
    }
    any_progress |= b->progress;
    if (b->num_live) {
      k++;
    } else {
      w->active.erase(w->active.begin() + static_cast<std::ptrdiff_t>(k));
      finish_block(w, b);
      any_progress = true;
    }
  }
  if (any_progress) {
    idle->rounds = 0;
    g_progress++;
    return;
  }
  if (++idle->rounds > 4) wait_a_little(idle->rounds);
  if (idle->rounds == 1 || g_progress != idle->progress_seen) {
    idle->since = Clock::now();
    idle->progress_seen = g_progress;
  } else if (seconds_since(idle->since) > g_config.hang_seconds) {
    fprintf(stderr, "simt: HANG: no progress for %.0f s (worker %d)\n", g_config.hang_seconds, w->id);
    dump_workers();
    abort();
  }
}

void take_inbox_locked(Worker* w) {
  w->active.insert(w->active.end(), w->inbox.begin(), w->inbox.end());
  w->inbox.clear();
}

void worker_main(Worker* w) {
  if (g_tsan) w->main_tsan_fiber = __tsan_get_current_fiber();
  IdleState idle;
  for (;;) {
    {
      EngineLock lock(g_mutex);
      g_work_available.wait(*lock, [w]() { return !w->inbox.empty() || !w->active.empty() || g_stop; });
      take_inbox_locked(w);
      if (w->active.empty()) return;  // g_stop
    }
    run_round(w, &idle);
  }
}

// workers == -1: the caller of stream_sync is the worker.
void run_inline(Stream* s) {
  Worker* w = g_workers[0].get();
  if (g_tsan) w->main_tsan_fiber = __tsan_get_current_fiber();
  w->main_stack = nullptr;
  IdleState idle;
  for (;;) {
    {
      const EngineLock lock(g_mutex);
      if (s->queue.empty()) return;
      take_inbox_locked(w);
    }
    run_round(w, &idle);
  }
}

void stop_workers() {
  {
    const EngineLock lock(g_mutex);
    g_stop = true;
  }
  g_work_available.notify_all();
  for (auto& w : g_workers) w->thread.join();
}

void start_workers_locked() {
  if (!g_workers.empty()) return;
  if (!g_configured) configure(g_config);
  for (int i = 0; i < std::max(1, g_config.workers); i++) {
    g_workers.push_back(std::make_unique<Worker>());
    g_workers.back()->id = i;
    g_workers.back()->rng_state =
        (g_config.seed + 1) * 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(i) * 77777 + 1;
  }
  if (g_config.workers < 0) return;
  for (auto& w : g_workers) w->thread = std::thread(worker_main, w.get());
  atexit(stop_workers);
}

// ---- watchdog: a CUDA thread that never reaches a yield point ----------------------------------

class Watchdog {
 public:
  // Called now and then while the host waits.
  void check() {
    for (size_t i = 0; i < g_workers.size(); i++) {
      const Worker& w = *g_workers[i];
      const uint64_t switches = w.switches.load(std::memory_order_relaxed);
      if (seen_.size() <= i) seen_.resize(i + 1, {~uint64_t{0}, Clock::now()});
      auto& [last, since] = seen_[i];
      if (switches != last || !w.running.load(std::memory_order_relaxed)) {
        last = switches;
        since = Clock::now();
      } else if (seconds_since(since) > g_config.hang_seconds) {
        fprintf(stderr, "simt: HANG: a CUDA thread has not yielded for %.0f s (raw spin loop?)\n",
                g_config.hang_seconds);
        dump_workers();
        abort();
      }
    }
  }

 private:
  std::vector<std::pair<uint64_t, Clock::time_point>> seen_;
};

double env_or(const char* name, double fallback) {
  const char* value = getenv(name);
  return value ? atof(value) : fallback;
}

}  // namespace

// ---- public API --------------------------------------------------------------------------------

void configure(const Config& config) {
  g_config = config;
  g_configured = true;
  const int default_workers =
      config.workers ? config.workers : static_cast<int>(std::thread::hardware_concurrency());
  g_config.workers = static_cast<int>(env_or("SIMT_WORKERS", default_workers));
  g_config.seed = static_cast<uint64_t>(env_or("SIMT_SEED", static_cast<double>(config.seed)));
  g_config.chaos = static_cast<int>(env_or("SIMT_CHAOS", config.chaos));
  g_config.hang_seconds = env_or("SIMT_HANG", config.hang_seconds);
}

stream_t stream_create(int device, int max_resident_blocks) {
  return new Stream{device, max_resident_blocks, {}, {}, nullptr};
}

void launch_raw(stream_t s, dim3 grid, dim3 block, std::function<void()> body, const char* name) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024) die("%s: %zu threads per block", name, size_t{threads});
  if (blocks == 0) die("%s: empty grid", name);

  auto launch = std::make_unique<Launch>();
  launch->body = std::move(body);
  launch->grid = grid;
  launch->block = block;
  launch->name = name;
  launch->stream = s;
  launch->num_blocks = blocks;
  hb_release(&launch->start);

  const EngineLock lock(g_mutex);
  if (s->capture != nullptr) {
    s->capture->nodes.push_back({grid, block, std::move(launch->body), name});
    return;
  }
  start_workers_locked();
  const bool first = s->queue.empty();
  if (first && !s->finished.empty()) launch->previous_finished = &s->finished.back()->finished;
  s->queue.push_back(std::move(launch));
  if (first) dispatch_locked(s);
}

void stream_sync(stream_t s) {
  if (g_config.workers < 0 && !g_workers.empty()) run_inline(s);
  Watchdog watchdog;
  std::vector<std::unique_ptr<Launch>> finished;
  {
    EngineLock lock(g_mutex);
    if (s->capture != nullptr) die("a stream that is captured was waited for");
    // The system clock on purpose: pthread_cond_clockwait is unknown to older TSan runtimes.
    while (!g_launch_done.wait_until(*lock, std::chrono::system_clock::now() + std::chrono::seconds(1),
                                     [s]() { return s->queue.empty(); })) {
      watchdog.check();
    }
    finished.swap(s->finished);
  }
  for (const auto& launch : finished) hb_acquire(&launch->finished);
  const QuietScope quiet;
  for (const auto& launch : finished) {
    for (Block* b : launch->graveyard) delete_block(b);
  }
}

bool stream_idle(stream_t s) {
  if (g_config.workers < 0) return true;  // work is done in stream_sync()
  const EngineLock lock(g_mutex);
  if (s->capture != nullptr) die("a stream that is captured was asked for its state");
  return s->queue.empty();
}

void capture_begin(stream_t s) {
  const EngineLock lock(g_mutex);
  if (s->capture != nullptr) die("a stream is captured twice");
  s->capture = std::make_unique<Graph>();
}

std::shared_ptr<Graph> capture_end(stream_t s) {
  const EngineLock lock(g_mutex);
  if (s->capture == nullptr) die("a capture ends that did not begin");
  return std::move(s->capture);
}

size_t graph_size(const Graph& graph) { return graph.nodes.size(); }

void graph_launch(const Graph& graph, stream_t s) {
  for (const Graph::Node& node : graph.nodes) {
    launch_raw(s, node.grid, node.block, node.body, node.name);
  }
}

void host_thread_checkpoint() {
  if (kTsanHasSlots) hb_release(&g_tsan_anchor);
}

void observe_vectors(VectorObserver observer) { g_vector_observer = observer; }

uint64_t system_releases() {
  uint64_t total = 0;
  for (const auto& w : g_workers) total += w->system_releases;
  return total;
}

}  // namespace simt
