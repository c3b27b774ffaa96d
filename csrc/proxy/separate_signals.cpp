#include "proxy/separate_signals.h"

#include <utility>

#include "errors.h"

namespace efa_ep {
namespace {

// The context of a request says whose it is, and which of its write's two.
constexpr uint64_t context_of(uint32_t write, bool is_data) {
  return uint64_t{write} << 1 | (is_data ? 1 : 0);
}

}  // namespace

PostResult SeparateSignals::post_write(const WriteRequest& request) {
  post_due();
  // A signal that finds no room goes before new bytes, or it might never.
  if (stalled() || !due_.empty()) return PostResult::kAgain;

  const uint32_t write = create(request.context);
  if (request.bytes > 0 || !request.notify) {
    if (post_bytes(request, write) == PostResult::kAgain) {
      free_.push_back(write);
      return PostResult::kAgain;
    }
    ++writes_[write].incomplete;
  }
  if (!request.notify) return PostResult::kPosted;

  const BatchPosition batch = open_batch(request.peer);
  if (request.bytes > 0) {
    ++batch->writes;
    if (waits()) {
      ++batch->undelivered;
      writes_[write].batch = batch;
    }
  }
  ++writes_[write].incomplete;
  WriteRequest& signal = batch->signals.emplace_back(request);
  signal.bytes = 0;
  signal.context = context_of(write, false);
  if (closes_batch(request.ends)) {
    open_.erase(request.peer);
    batch->closed = true;
    if (batch->writes > 0) {
      on_closed(batch);
    } else {
      release(batch);
    }
    post_due();
  }
  return PostResult::kPosted;
}

uint32_t SeparateSignals::create(uint64_t context) {
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(writes_.size()));
    writes_.emplace_back();
  }
  const uint32_t write = free_.back();
  free_.pop_back();
  writes_[write] = {.context = context, .batch = batches_.end()};
  return write;
}

PostResult SeparateSignals::post_bytes(const WriteRequest& request, uint32_t write) {
  WriteRequest data = request;
  data.notify = false;
  data.delivered = request.delivered || (request.notify && waits());
  data.context = context_of(write, true);
  return fabric_.post_write(data);
}

SeparateSignals::BatchPosition SeparateSignals::open_batch(uint32_t peer) {
  const auto [found, is_new] = open_.try_emplace(peer);
  if (is_new) found->second = batches_.emplace(batches_.end());
  return found->second;
}

void SeparateSignals::release(BatchPosition batch) {
  due_.insert(due_.end(), batch->signals.begin(), batch->signals.end());
  batches_.erase(batch);
}

void SeparateSignals::post_due() {
  while (!due_.empty() && fabric_.post_write(due_.front()) == PostResult::kPosted) {
    add(signals_, 1);
    due_.pop_front();
  }
}

size_t SeparateSignals::poll(std::span<Completion> completions) {
  const size_t count = fabric_.poll(completions);
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    if (completions[i].kind != CompletionKind::kArrival && !take(completions[i])) continue;
    if (kept != i) completions[kept] = std::move(completions[i]);
    ++kept;
  }
  post_due();
  return kept;
}

bool SeparateSignals::take(Completion& completion) {
  const auto number = static_cast<uint32_t>(completion.context >> 1);
  const bool is_data = (completion.context & 1) != 0;
  Write& write = writes_[number];
  completion.context = write.context;
  const bool is_last = --write.incomplete == 0;
  if (is_last) free_.push_back(number);
  // A failed write stays undelivered: its batch is never signalled, as its reader must not take it for whole.
  if (completion.kind == CompletionKind::kError) return !std::exchange(write.failed, true);
  const BatchPosition batch = write.batch;
  const bool seen = is_last && !write.failed;
  if (is_data && batch != batches_.end() && --batch->undelivered == 0 && batch->closed) on_delivered(batch);
  return seen;
}

void WaitingSignals::on_closed(BatchPosition batch) {
  add(fences_, 1);
  if (batch->undelivered == 0) return release(batch);
  add(waits_, 1);
  ++waited_for_;
  batch->closed_at = clock_.now();
}

void WaitingSignals::on_delivered(BatchPosition batch) {
  if (stalled()) {
    const std::chrono::nanoseconds stalled_for = clock_.now() - batch->closed_at;
    add(stall_ns_, static_cast<uint64_t>(stalled_for.count()));
  }
  --waited_for_;
  release(batch);
}

NicOrderedSignals::NicOrderedSignals(Fabric& fabric) : SeparateSignals(fabric) {
  if (fabric.description().honours_fence) return;
  throw ConfigurationError("signal policy nic_ordered needs a fabric that honours fences, and provider " +
                           fabric.description().provider +
                           " does not; use EFA_EP_SIGNAL_POLICY=counted, or a provider that grants FI_FENCE");
}

void NicOrderedSignals::on_closed(BatchPosition batch) {
  std::vector<bool> fenced(fabric_.rails());
  for (WriteRequest& signal : batch->signals) {
    signal.fence = !fenced[signal.rail];
    fenced[signal.rail] = true;
    if (signal.fence) add(fences_, 1);
  }
  release(batch);
}

}  // namespace efa_ep
