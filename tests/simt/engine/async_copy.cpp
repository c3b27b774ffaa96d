// The async proxy: mbarriers and cp.async.bulk.
//
// Copies go to a queue that a hidden fiber of the block serves later (in random order under chaos),
// so that a missing wait shows up as wrong data. That fiber has a happens-before edge with generic
// shared-memory writes only through fence.proxy.async, so that TSan reports a missing fence.
// Stores run in two steps, reading the source and writing the destination, because
// cp.async.bulk.wait_group.read waits for the first step only.
#include <cstring>

#include "engine/state.h"

namespace simt {

namespace {

constexpr uint64_t kInitialisedPattern = 0x6d62617272696572ull;

// Called through a volatile pointer so that the sanitizers' interceptor sees the copy.
void* (*volatile g_intercepted_memcpy)(void*, const void*, size_t) = std::memcpy;

MBarrier& find_mbarrier(uint64_t* p) {
  auto& table = current_block()->async.mbarriers;
  auto it = table.find(p);
  if (it == table.end()) die("mbarrier %p is not initialised", static_cast<void*>(p));
  return it->second;
}

void complete_phase_if_due(MBarrier& m) {
  if (m.pending != 0 || m.tx_bytes != 0) return;
  m.phase ^= 1;
  m.pending = m.count;
}

BulkGroups& bulk_groups(Fiber* f) {
  if (!f->bulk) {
    QuietScope quiet;
    f->bulk = std::make_unique<BulkGroups>();
  }
  return *f->bulk;
}

void check_bulk(const void* dst, const void* src, uint32_t bytes) {
  check_align(dst, 16);
  check_align(src, 16);
  if (bytes % 16) die("bulk copy of %u bytes: not a multiple of 16", bytes);
}

void enqueue(const BulkCopy& copy) {
  QuietScope quiet;
  current_block()->async.queue.push_back(copy);
}

BulkCopy dequeue(Block* b) {
  QuietScope quiet;
  auto& queue = b->async.queue;
  const size_t k = g_config.chaos ? b->worker->random() % queue.size() : 0;
  BulkCopy copy = std::move(queue[k]);
  queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(k));
  return copy;
}

void run_load(Block* b, const BulkCopy& copy) {
  hb_acquire(&b->async.issued);
  g_intercepted_memcpy(copy.dst, copy.src, copy.bytes);
  MBarrier& m = b->async.mbarriers.at(copy.mbarrier);
  hb_release(&m.order[m.phase]);
  m.tx_bytes -= copy.bytes;
  complete_phase_if_due(m);
}

void read_store_source(Block* b, BulkCopy copy) {
  BulkGroups& groups = *b->fibers[copy.issuer].bulk;
  hb_acquire(&b->async.proxy_fences);
  {
    QuietScope quiet;
    copy.in_flight.resize(copy.bytes);
  }
  g_intercepted_memcpy(copy.in_flight.data(), copy.src, copy.bytes);
  hb_release(&groups.read_done);
  QuietScope quiet;
  groups.pending[copy.group].unread--;
  copy.source_read = true;
  b->async.queue.push_back(std::move(copy));
}

void write_store_destination(Block* b, BulkCopy copy) {
  BulkGroups& groups = *b->fibers[copy.issuer].bulk;
  g_intercepted_memcpy(copy.dst, copy.in_flight.data(), copy.bytes);
  hb_release(&groups.write_done);
  QuietScope quiet;
  groups.pending[copy.group].unwritten--;
  copy.in_flight = {};
}

void run_one_step(Block* b) {
  BulkCopy copy = dequeue(b);
  mark_progress(b);
  if (copy.mbarrier) {
    run_load(b, copy);
  } else if (!copy.source_read) {
    read_store_source(b, std::move(copy));
  } else {
    write_store_destination(b, std::move(copy));
  }
}

}  // namespace

// ---- mbarriers ---------------------------------------------------------------------------------

void mbar_init(uint64_t* barrier, uint32_t count) {
  QuietScope quiet;
  MBarrier& m = current_block()->async.mbarriers[barrier];
  m = MBarrier{};
  m.count = m.pending = count;
  *barrier = kInitialisedPattern;
}

void mbar_arrive(uint64_t* barrier, uint32_t tx_bytes) {
  MBarrier& m = find_mbarrier(barrier);
  if (!m.pending) die("mbarrier: more arrivals than its count of %u", m.count);
  hb_release(&m.order[m.phase]);
  m.tx_bytes += tx_bytes;
  m.pending--;
  current_block()->progress = true;
  complete_phase_if_due(m);
}

bool mbar_try(uint64_t* barrier, uint32_t parity) {
  MBarrier& m = find_mbarrier(barrier);
  if (m.phase == (parity & 1)) {
    spin_yield();
    return false;
  }
  hb_acquire(&m.order[parity & 1]);
  return true;
}

// ---- bulk copies -------------------------------------------------------------------------------

void bulk_load(void* dst_shared, const void* src, uint32_t bytes, uint64_t* barrier) {
  check_bulk(dst_shared, src, bytes);
  find_mbarrier(barrier);
  hb_release(&current_block()->async.issued);
  enqueue({dst_shared, src, bytes, barrier, cur().linear, 0});
  preempt_point();
}

void bulk_store(void* dst, const void* src_shared, uint32_t bytes) {
  check_bulk(dst, src_shared, bytes);
  BulkGroups& groups = bulk_groups(current_fiber());
  {
    QuietScope quiet;
    BulkGroup& group = groups.pending[groups.open];
    group.unread++;
    group.unwritten++;
  }
  enqueue({dst, src_shared, bytes, nullptr, cur().linear, groups.open});
  preempt_point();
}

void bulk_commit() { bulk_groups(current_fiber()).open++; }

// Waits until all committed groups but the `allowed` most recent ones are complete.
void bulk_wait(int allowed, bool read_only) {
  BulkGroups& groups = bulk_groups(current_fiber());
  const auto outstanding = [&]() {
    for (const auto& [index, group] : groups.pending) {
      if (index + static_cast<uint32_t>(allowed) >= groups.open) break;
      if ((read_only ? group.unread : group.unwritten) > 0) return true;
    }
    return false;
  };
  while (outstanding()) spin_yield();
  hb_acquire(read_only ? &groups.read_done : &groups.write_done);
  QuietScope quiet;
  while (!groups.pending.empty() && groups.pending.begin()->first < groups.open &&
         groups.pending.begin()->second.unwritten == 0) {
    groups.pending.erase(groups.pending.begin());
  }
}

void proxy_fence() { hb_release(&current_block()->async.proxy_fences); }

// Body of the hidden fiber.
void async_engine_main(Block* b) {
  Fiber* me = &b->async.fiber;
  for (;;) {
    while (!b->async.queue.empty()) {
      run_one_step(b);
      reschedule(b, me, Yield::blocked);
    }
    const int i = pick_runnable(b, b->next);
    if (i < 0) {
      switch_to(b->worker, me, nullptr);
    } else {
      run_fiber(b->worker, b, me, static_cast<uint32_t>(i));
    }
  }
}

}  // namespace simt
