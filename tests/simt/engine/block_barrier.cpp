// __syncthreads, bar.sync and bar.arrive. Counting is per thread and strict.
#include "engine/state.h"

namespace simt {

namespace {

void complete(Block* b, NamedBarrier& barrier) {
  barrier.arrived = 0;
  barrier.generation++;
  barrier.votes[barrier.generation & 1] = 0;
  mark_progress(b);
  for (uint32_t i : barrier.waiting) set_runnable(b, i);
  barrier.waiting.clear();
}

}  // namespace

int block_barrier(int id, int threads, bool arrive_only, bool vote) {
  Block* b = current_block();
  Fiber* f = current_fiber();
  if (id < 0 || id >= kNamedBarriers) die("barrier id %d out of range", id);
  if (threads % 32 || threads < 0 || (arrive_only && !threads)) {
    die("barrier %d: thread count %d must be a positive multiple of 32", id, threads);
  }
  NamedBarrier& barrier = b->barriers[id];
  if (barrier.arrived && barrier.expected != threads) {
    die("barrier %d used with different counts %d and %d", id, barrier.expected, threads);
  }
  SyncPoint* order = &barrier.order[barrier.generation & 1];
  barrier.expected = threads;
  barrier.arrived++;
  // Read by all threads before any of them can complete the next generation, which clears it.
  const int& votes = barrier.votes[barrier.generation & 1];
  barrier.votes[barrier.generation & 1] += vote ? 1 : 0;
  hb_release(order);
  if (barrier.arrived == (threads ? threads : static_cast<int>(b->num_live))) {
    complete(b, barrier);
    if (!arrive_only) hb_acquire(order);
    return votes;
  }
  if (arrive_only) return 0;
  barrier.waiting.push_back(f->self.linear);
  clear_runnable(b, f->self.linear, FiberState::waiting);
  f->waiting_for = "block barrier";
  while (f->state == FiberState::waiting) reschedule(b, f, Yield::blocked);
  f->waiting_for = "";
  hb_acquire(order);
  return votes;
}

// __syncthreads waits for the threads that have not exited.
void barriers_thread_exit(Block* b) {
  for (NamedBarrier& barrier : b->barriers) {
    if (barrier.arrived && !barrier.expected && barrier.arrived == static_cast<int>(b->num_live)) {
      complete(b, barrier);
    }
  }
}

}  // namespace simt
