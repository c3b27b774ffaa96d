// Fibers: switching, picking the next one, yielding. One block lives on one worker for ever.
#include <cstdio>
#include <ctime>

#include "engine/fiber_switch.h"
#include "engine/state.h"

namespace simt {

thread_local CudaThread* tls_thread __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr uint32_t kLoadsPerYield = 256;  // polling detector: yield at least this often
constexpr uint32_t kSpinsPerTurn = 64;

uint32_t count_runnable(const Block* b) {
  uint32_t n = b->async.queue.empty() ? 0 : 1;
  for (uint32_t lanes : b->runnable) n += static_cast<uint32_t>(__builtin_popcount(lanes));
  return n;
}

// Body of every fiber, entered on its own stack by the first switch to it.
void fiber_main() {
  Fiber* f = current_fiber();
  Block* b = f->self.block;
  Worker* w = b->worker;
  if (g_asan) {
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!w->main_stack) {
      w->main_stack = bottom;
      w->main_stack_bytes = bytes;
    }
  }

  if (f == &b->async.fiber) async_proxy_main(b);

  hb_acquire(&b->launch->start);
  if (b->launch->previous_finished) hb_acquire(b->launch->previous_finished);
  b->launch->body();
  hb_release(&b->launch->finished);

  const uint32_t i = f->self.linear;
  clear_runnable(b, i, FiberState::done);
  b->num_live--;
  mark_progress(b);
  warps_thread_exit(b, i);
  barriers_thread_exit(b);
  reschedule(b, f, Yield::blocked);
  die("a finished thread was resumed");
}

void prepare_fiber(Worker* w, Fiber* f, const char* name) {
  if (!f->stack) {
    if (w->stack_pool.empty()) w->stack_pool.push_back(map_stack(stack_bytes()));
    f->stack = w->stack_pool.back();
    w->stack_pool.pop_back();
  }
  if (g_asan) __asan_unpoison_memory_region(f->stack, stack_bytes());
  f->sp = make_initial_frame(f->stack, stack_bytes(), fiber_main);
  if (g_tsan) {
    f->tsan_fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(f->tsan_fiber, name);
  }
}

}  // namespace

size_t stack_bytes() { return (g_asan || g_tsan ? 256 : 64) << 10; }

void switch_to(Worker* w, Fiber* from, Fiber* to, bool dying) {
  w->switches.store(w->switches.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  void** from_sp = from ? &from->sp : &w->main_sp;
  void* to_sp = to ? to->sp : w->main_sp;
  w->running.store(to, std::memory_order_relaxed);
  tls_thread = to ? &to->self : nullptr;
  if (g_asan) {
    void** save = dying ? nullptr : (from ? &from->asan_fake_stack : &w->main_fake_stack);
    __sanitizer_start_switch_fiber(save, to ? to->stack : w->main_stack,
                                   to ? stack_bytes() : w->main_stack_bytes);
  }
  if (g_tsan) tsan_switch(to ? to->tsan_fiber : w->main_tsan_fiber);
  simt_switch_stack(from_sp, to_sp);
  if (g_asan) {
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(from ? from->asan_fake_stack : w->main_fake_stack, &bottom, &bytes);
  }
}

// Runs on the worker's own stack: a TSan fiber created by a CUDA thread would inherit that thread's
// clock, and races between the two would go unseen.
void prepare_block(Worker* w, Block* b) {
  char name[96] = "";
  for (Fiber& f : b->fibers) {
    if (g_tsan) {
      snprintf(name, sizeof name, "dev%d %s b%u t%u", f.self.device, b->launch->name, f.self.block_idx.x,
               f.self.linear);
    }
    prepare_fiber(w, &f, name);
  }
  prepare_fiber(w, &b->async.fiber, "async proxy");
}

int pick_runnable(Block* b, uint32_t start) {
  const uint32_t first = (start / 32) % b->num_warps;
  const uint32_t lanes = b->runnable[first] & (~0u << (start % 32));
  if (lanes) return static_cast<int>(first * 32) + __builtin_ctz(lanes);
  for (uint32_t k = 1; k <= b->num_warps; k++) {
    const uint32_t warp = (first + k) % b->num_warps;
    if (b->runnable[warp]) return static_cast<int>(warp * 32) + __builtin_ctz(b->runnable[warp]);
  }
  return -1;
}

void run_fiber(Worker* w, Block* b, Fiber* from, uint32_t index, bool dying) {
  Fiber* to = &b->fibers[index];
  b->next = index + 1;
  if (to->state == FiberState::fresh) {
    to->state = FiberState::runnable;
    mark_progress(b);
  }
  if (to != from) switch_to(w, from, to, dying);
}

// Gives up the processor. Runs on the stack of fiber `me`.
void reschedule(Block* b, Fiber* me, Yield reason) {
  Worker* w = b->worker;
  const bool chaos = g_config.chaos != 0;
  if (reason == Yield::spinning) {
    // Everybody only polls, or somebody polls between barriers for ever: let other blocks run.
    if (++b->spins > count_runnable(b) || ++b->spins_this_turn > kSpinsPerTurn) {
      b->spins = b->spins_this_turn = 0;
      switch_to(w, me, nullptr);
      return;
    }
  }
  const bool dying = me->state == FiberState::done;
  Fiber* async = &b->async.fiber;
  const bool async_turn = chaos ? w->random() % 4 == 0 : reason == Yield::spinning;
  if (me != async && !b->async.queue.empty() && async_turn) {
    switch_to(w, me, async, dying);
    return;
  }
  uint32_t start = b->next;
  if (reason == Yield::preempted || (chaos && w->random() % 8 == 0)) {
    start = static_cast<uint32_t>(w->random() % (b->num_warps * 32));
  }
  const int i = pick_runnable(b, start);
  if (i < 0) {
    switch_to(w, me, nullptr, dying);
  } else {
    run_fiber(w, b, me, static_cast<uint32_t>(i), dying);
  }
}

void spin_yield() {
  if (!in_kernel()) return;
  Fiber* f = current_fiber();
  f->polled_address = nullptr;
  f->loads_since_yield = 0;
  f->waiting_for = "spin";
  reschedule(current_block(), f, Yield::spinning);
  f->waiting_for = "";
}

void preempt_point() {
  if (__builtin_expect(g_config.chaos == 0, 1) || !in_kernel()) return;
  Block* b = current_block();
  Worker* w = b->worker;
  if (w->random() % static_cast<uint64_t>(g_config.chaos)) return;
  Fiber* f = current_fiber();
  if (w->random() % 16 == 0) {
    switch_to(w, f, nullptr);  // even let other blocks run
  } else {
    reschedule(b, f, Yield::preempted);
  }
}

void told_others() {
  constexpr uint32_t kActAtOnce = 4;  // one in so many times
  if (g_config.chaos == 0 || !in_kernel() || current_block()->worker->random() % kActAtOnce != 0) return;
  const timespec pause{0, 20000};
  nanosleep(&pause, nullptr);
}

// The CPU time of all threads, and some of the world's time for when they all sleep.
uint64_t global_timer() {
  const auto nanoseconds = [](clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
  };
  return nanoseconds(CLOCK_PROCESS_CPUTIME_ID) + nanoseconds(CLOCK_MONOTONIC) / 4;
}

bool random_bit() { return g_config.chaos != 0 && in_kernel() && current_block()->worker->random() % 2 == 0; }

// Polling detector. A thread that loads the same value from the same address twice in a row, or
// that has done many synchronising loads without yielding, yields as if it had called spin_pause().
void note_poll(const void* p, uint64_t value) {
  Fiber* f = current_fiber();
  if ((f->polled_address == p && f->polled_value == value) || ++f->loads_since_yield >= kLoadsPerYield) {
    spin_yield();
    return;
  }
  f->polled_address = p;
  f->polled_value = value;
}

}  // namespace simt
