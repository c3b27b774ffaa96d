// Fatal errors and state dumps.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "engine/state.h"

namespace simt {

void die(const char* format, ...) {
  char message[512];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  if (tls_thread) {
    const CudaThread& t = *tls_thread;
    fprintf(stderr, "simt: dev %d kernel %s block %u thread %u (warp %u lane %u): %s\n", t.device,
            t.block->launch->name, t.block_idx.x, t.linear, t.warp, t.lane, message);
  } else {
    fprintf(stderr, "simt: %s\n", message);
  }
  fprintf(stderr, "simt: workers %d seed %llu chaos %d\n", g_config.workers,
          static_cast<unsigned long long>(g_config.seed), g_config.chaos);
  fflush(stderr);
  abort();
}

static const char* describe(const Fiber& f) {
  if (f.state == FiberState::done) return "done";
  if (f.state == FiberState::fresh) return "not started";
  return *f.waiting_for ? f.waiting_for : "running";
}

void dump_block(const Block* b) {
  struct Group {
    int count = 0;
    uint32_t example = 0;
  };
  std::map<std::string, Group> groups;
  for (const Fiber& f : b->fibers) {
    Group& g = groups[describe(f)];
    g.count++;
    g.example = f.self.linear;
  }
  fprintf(stderr, "  dev %d %s block %u: live %u/%u;", b->launch->stream->device, b->launch->name,
          b->fibers[0].self.block_idx.x, b->num_live, b->num_threads);
  for (const auto& [what, group] : groups) {
    fprintf(stderr, " %s=%d(e.g. t%u)", what.c_str(), group.count, group.example);
  }
  for (int i = 0; i < kNamedBarriers; i++) {
    const NamedBarrier& r = b->barriers[i];
    if (r.arrived == 0) continue;
    fprintf(stderr, " bar%d %d/%d", i, r.arrived, r.expected ? r.expected : static_cast<int>(b->num_live));
  }
  if (!b->async.queue.empty()) fprintf(stderr, " bulk copies %zu", b->async.queue.size());
  fprintf(stderr, "\n");
}

// Best effort: other workers may be running while their state is printed.
void dump_workers() {
  for (const auto& w : g_workers) {
    if (const Fiber* f = w->running.load()) {
      const CudaThread& t = f->self;
      fprintf(stderr, "  worker %d is inside dev %d %s block %u thread %u\n", w->id, t.device,
              t.block->launch->name, t.block_idx.x, t.linear);
    }
    for (const Block* b : w->active) dump_block(b);
  }
}

}  // namespace simt
