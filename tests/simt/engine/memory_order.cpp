// Scopes, polling and standalone fences.
//
// TSan understands acquire/release accesses but not standalone fences. A fence is emulated with
// extra TSan fibers that serve as vector clocks:
//   * fence.release copies the thread's clock into a "release" fiber; a later relaxed store or RMW
//     publishes that clock - not the thread's current one - at the stored address. Writes between
//     the fence and the flag store therefore stay unordered, as in the PTX memory model.
//   * a relaxed load collects the clock published at the loaded address in a "loaded" fiber;
//     fence.acquire copies what was collected into the thread's clock.
// A gpu-scope fence publishes only to memory of the same device; a flag in peer or host memory then
// gives no ordering, and TSan reports the data accesses behind it.
#include <atomic>
#include <vector>

#include "engine/state.h"

namespace simt {

namespace {

struct Range {
  uintptr_t begin, end;
  MemoryKind kind;
  int device;
};
std::vector<Range> g_ranges;
std::atomic<bool> g_have_ranges{false};

// The registered range that holds p, if it is not plain memory of the calling thread's device.
const Range* foreign_range(const void* p) {
  if (!g_have_ranges.load(std::memory_order_relaxed) || !in_kernel()) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (const Range& r : g_ranges) {
    if (address < r.begin || address >= r.end) continue;
    const bool foreign = r.kind != MemoryKind::device || r.device != cur().device;
    return foreign ? &r : nullptr;
  }
  return nullptr;
}

// Runs `action` with `clock` as TSan's current fiber.
template <class F>
void with_clock(void* clock, F&& action) {
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(clock, kTsanNoSync);
  action();
  tsan_switch(self);
}

FenceClocks* fence_clocks(Fiber* f) {
  if (!f->fences) {
    QuietScope quiet;
    f->fences = std::make_unique<FenceClocks>();
  }
  return f->fences.get();
}

// A new TSan fiber inherits the clock of its creator, which is what a fresh snapshot must hold.
void snapshot(FenceClocks* clocks, void** clock) {
  if (!*clock) {
    *clock = __tsan_create_fiber(0);
    return;
  }
  hb_release(&clocks->mailbox);
  with_clock(*clock, [clocks]() { hb_acquire(&clocks->mailbox); });
}

}  // namespace

void register_range(const void* p, size_t bytes, MemoryKind kind, int device) {
  const EngineLock lock(g_mutex);
  const auto begin = reinterpret_cast<uintptr_t>(p);
  g_ranges.push_back({begin, begin + bytes, kind, device});
  g_have_ranges = true;
}

void unregister_ranges(int device) {
  const EngineLock lock(g_mutex);
  std::erase_if(g_ranges, [device](const Range& r) { return r.device == device; });
}

void check_scope(const void* p, Scope scope) {
  if (scope == Scope::sys) return;
  if (const Range* r = foreign_range(p)) {
    const char* kind = r->kind == MemoryKind::host                ? "host"
                       : r->kind == MemoryKind::written_by_others ? "shared"
                                                                  : "peer";
    die("%s-scope synchronisation on %s memory of device %d", scope == Scope::gpu ? "gpu" : "cta", kind,
        r->device);
  }
}

void note_load(const void* p, uint64_t value, bool relaxed) {
  if (!in_kernel()) return;
  if (g_tsan && relaxed) {
    FenceClocks* clocks = fence_clocks(current_fiber());
    if (!clocks->loaded) clocks->loaded = __tsan_create_fiber(0);
    with_clock(clocks->loaded, [p]() { __tsan_acquire(const_cast<void*>(p)); });
  }
  note_poll(p, value);
}

void note_relaxed_store(const void* p) {
  if (!g_tsan || !in_kernel()) return;
  const FenceClocks* clocks = current_fiber()->fences.get();
  if (!clocks) return;
  const auto publish = [p]() { __tsan_release(const_cast<void*>(p)); };
  if (clocks->release_sys) with_clock(clocks->release_sys, publish);
  if (clocks->release_gpu && !foreign_range(p)) with_clock(clocks->release_gpu, publish);
}

void note_release(Scope scope) {
  if (scope == Scope::sys && in_kernel()) current_block()->worker->system_releases++;
}

void fence(bool acquire, bool release, Scope scope) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (!in_kernel()) return;
  preempt_point();
  if (release) note_release(scope);
  if (!g_tsan) return;
  FenceClocks* clocks = fence_clocks(current_fiber());
  if (acquire && clocks->loaded) {
    with_clock(clocks->loaded, [clocks]() { hb_release(&clocks->mailbox); });
    hb_acquire(&clocks->mailbox);
  }
  if (release) {
    // A system fence also covers everything a gpu fence does; keep both clocks up to date.
    if (scope == Scope::sys) snapshot(clocks, &clocks->release_sys);
    if (scope != Scope::sys || clocks->release_gpu) snapshot(clocks, &clocks->release_gpu);
  }
}

void destroy_fence_clocks(Fiber* f) {
  if (!f->fences) return;
  for (void* clock : {f->fences->release_gpu, f->fences->release_sys, f->fences->loaded}) {
    if (clock) __tsan_destroy_fiber(clock);
  }
  f->fences.reset();
}

}  // namespace simt
