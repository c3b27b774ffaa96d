// Warp collectives: all lanes named in a mask meet, exchange 64 bits each and go on.
//
// Strictness: the calling lane must be in its own mask, no named lane may have exited, all lanes
// must ask for the same operation. Only __syncwarp orders memory; shuffles, votes, matches and
// reductions do not, exactly as in PTX.
#include "engine/state.h"

namespace simt {

namespace {

WarpGroup* find_group(Warp& w, uint32_t mask) {
  for (uint32_t k = 0; k < w.num_groups; k++) {
    if (w.groups[k].mask == mask) return &w.groups[k];
  }
  if (w.num_groups < kWarpGroups) {
    WarpGroup* group = &w.groups[w.num_groups++];
    group->mask = mask;
    return group;
  }
  for (WarpGroup& group : w.groups) {  // table full: recycle an idle entry
    if (!group.arrived && !group.resuming) {
      group.mask = mask;
      return &group;
    }
  }
  die("too many distinct warp masks in flight");
}

const uint64_t* rendezvous(uint32_t mask, WarpOp op, uint64_t value) {
  Block* b = current_block();
  Fiber* f = current_fiber();
  const uint32_t lane = f->self.lane;
  Warp& w = b->warps[f->self.warp];
  const bool ordered = op == WarpOp::sync;

  if (!(mask >> lane & 1)) die("calling lane is not in mask %08x", mask);
  mask &= existing_lanes();
  if (mask & ~w.live) die("warp collective names exited lanes %08x (mask %08x)", mask & ~w.live, mask);

  WarpGroup* group = find_group(w, mask);
  const uint32_t buffer = group->generation & 1;
  if (group->arrived && group->op != op) {
    die("divergent warp collective: kinds %u and %u meet on mask %08x", static_cast<unsigned>(group->op),
        static_cast<unsigned>(op), mask);
  }
  group->op = op;
  group->slots[buffer][lane] = value;
  if (ordered) hb_release(&group->order[buffer]);
  group->arrived |= 1u << lane;

  if (group->arrived == mask) {
    group->arrived = 0;
    group->generation++;
    group->resuming = mask & ~(1u << lane);
    mark_progress(b);
    for (uint32_t m = group->resuming; m; m &= m - 1) {
      set_runnable(b, f->self.warp * 32 + static_cast<uint32_t>(__builtin_ctz(m)));
    }
  } else {
    clear_runnable(b, f->self.linear, FiberState::waiting);
    f->waiting_for = ordered ? "syncwarp" : "warp exchange";
    while (f->state == FiberState::waiting) reschedule(b, f, Yield::blocked);
    f->waiting_for = "";
    group->resuming &= ~(1u << lane);
  }
  if (ordered) hb_acquire(&group->order[buffer]);
  return group->slots[buffer];
}

}  // namespace

const uint64_t* warp_exchange(uint32_t mask, WarpOp op, uint64_t value) {
  return rendezvous(mask, op, value);
}

void warp_sync(uint32_t mask) { rendezvous(mask, WarpOp::sync, 0); }

void warps_thread_exit(Block* b, uint32_t thread) {
  Warp& w = b->warps[thread / 32];
  const uint32_t bit = 1u << (thread % 32);
  w.live &= ~bit;
  for (uint32_t k = 0; k < w.num_groups; k++) {
    const WarpGroup& group = w.groups[k];
    if (group.arrived && (group.mask & bit)) {
      die("thread exits while lanes %08x wait for it in a warp collective with mask %08x", group.arrived,
          group.mask);
    }
  }
}

}  // namespace simt
