// The async proxy: mbarriers, and bulk copies between global and shared memory.
//
// Copies go to a queue that a hidden fiber of the block serves later, under chaos in any order, so that a
// missing wait shows as wrong data. Nothing that threads have written comes before what that fiber reads but
// through fence.proxy.async, so that ThreadSanitizer reports a missing fence. Stores take two steps, to read
// and to write, because cp.async.bulk.wait_group.read waits for the first one only.
#include <cstring>

#include "engine/state.h"

namespace simt {

namespace {

constexpr uint32_t kVectorBytes = 16;

// Called through a volatile pointer, so that the sanitizers' interceptor sees the copy.
void* (*volatile g_intercepted_memcpy)(void*, const void*, size_t) = std::memcpy;

AsyncProxy& async_proxy() { return current_block()->async; }

MBarrier& find_mbarrier(uint64_t* barrier) {
  auto& table = async_proxy().mbarriers;
  const auto found = table.find(barrier);
  if (found == table.end()) die("mbarrier %p is not initialised", static_cast<void*>(barrier));
  return found->second;
}

void complete_phase_if_due(MBarrier& m) {
  if (m.pending != 0 || m.expected_bytes != 0) return;
  m.phase ^= 1;
  m.pending = m.count;
}

BulkGroups& bulk_groups(Fiber* f) {
  QuietScope quiet;
  if (!f->bulk) f->bulk = std::make_unique<BulkGroups>();
  return *f->bulk;
}

void enqueue(BulkCopy copy) {
  check_align(copy.to, kVectorBytes);
  check_align(copy.from, kVectorBytes);
  if (copy.bytes % kVectorBytes != 0) die("bulk copy of %u bytes: not a multiple of 16", copy.bytes);
  {
    QuietScope quiet;
    async_proxy().queue.push_back(std::move(copy));
  }
  preempt_point();
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
  g_intercepted_memcpy(copy.to, copy.from, copy.bytes);
  MBarrier& m = b->async.mbarriers.at(copy.mbarrier);
  hb_release(&m.order[m.phase]);
  m.expected_bytes -= copy.bytes;
  complete_phase_if_due(m);
}

void read_for_store(Block* b, BulkCopy copy) {
  {
    QuietScope quiet;
    copy.read.resize(copy.bytes);
  }
  g_intercepted_memcpy(copy.read.data(), copy.from, copy.bytes);
  BulkGroups& groups = *b->fibers[copy.issuer].bulk;
  hb_release(&groups.all_read);
  QuietScope quiet;
  groups.pending[copy.group].unread--;
  b->async.queue.push_back(std::move(copy));
}

void write_for_store(Block* b, BulkCopy copy) {
  g_intercepted_memcpy(copy.to, copy.read.data(), copy.bytes);
  BulkGroups& groups = *b->fibers[copy.issuer].bulk;
  hb_release(&groups.all_written);
  QuietScope quiet;
  groups.pending[copy.group].unwritten--;
  copy.read = {};
}

void run_one_step(Block* b) {
  mark_progress(b);
  hb_acquire(&b->async.fences);
  BulkCopy copy = dequeue(b);
  if (copy.mbarrier != nullptr) {
    run_load(b, copy);
  } else if (copy.read.empty()) {
    read_for_store(b, std::move(copy));
  } else {
    write_for_store(b, std::move(copy));
  }
}

void note_vectors(const void* p, uint32_t bytes, bool write) {
  const auto* first = static_cast<const std::byte*>(p);
  for (uint32_t at = 0; at < bytes; at += kVectorBytes) note_vector(first + at, write);
}

}  // namespace

// ---- mbarriers ---------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  QuietScope quiet;
  async_proxy().mbarriers[barrier] = {.count = count, .pending = count};
}

void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes) {
  MBarrier& m = find_mbarrier(barrier);
  if (m.pending == 0) die("mbarrier: more arrivals than its count of %u", m.count);
  hb_release(&m.order[m.phase]);
  m.expected_bytes += expected_bytes;
  m.pending--;
  current_block()->progress = true;
  complete_phase_if_due(m);
}

bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  MBarrier& m = find_mbarrier(barrier);
  if (m.phase == (parity & 1)) {
    spin_yield();
    return false;
  }
  hb_acquire(&m.order[parity & 1]);
  return true;
}

// ---- bulk copies -------------------------------------------------------------------------------

void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  find_mbarrier(barrier);
  note_vectors(from, bytes, false);
  enqueue({.to = to_shared, .from = from, .bytes = bytes, .mbarrier = barrier, .issuer = cur().linear});
}

void bulk_store(void* to, const void* from_shared, uint32_t bytes) {
  BulkGroups& groups = bulk_groups(current_fiber());
  {
    QuietScope quiet;
    BulkGroup& group = groups.pending[groups.open];
    group.unread++;
    group.unwritten++;
  }
  note_vectors(to, bytes, true);
  enqueue({.to = to, .from = from_shared, .bytes = bytes, .issuer = cur().linear, .group = groups.open});
}

void bulk_commit_group() { bulk_groups(current_fiber()).open++; }

void bulk_wait_group(uint32_t most_pending, bool read_only) {
  BulkGroups& groups = bulk_groups(current_fiber());
  const auto is_pending = [&]() {
    for (const auto& [index, group] : groups.pending) {
      if (index + most_pending >= groups.open) break;
      if ((read_only ? group.unread : group.unwritten) > 0) return true;
    }
    return false;
  };
  while (is_pending()) spin_yield();
  hb_acquire(read_only ? &groups.all_read : &groups.all_written);
  QuietScope quiet;
  std::erase_if(groups.pending,
                [&](const auto& entry) { return entry.first < groups.open && entry.second.unwritten == 0; });
}

void fence_proxy_async() { hb_release(&async_proxy().fences); }

// Body of the hidden fiber.
void async_proxy_main(Block* b) {
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
