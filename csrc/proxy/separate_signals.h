// The policies whose signals are requests of their own.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <unordered_map>
#include <vector>

#include "proxy/signal_policy.h"

namespace efa_ep {

/// Splits every write into a request for its bytes and one for its signal, and reports the write when both
/// are complete. Writes to one peer up to a boundary are a batch: their signals are ordered by one fence. A
/// write without bytes is a signal already; a silent one (WriteRequest::notify) has none.
class SeparateSignals : public SignalPolicy {
 public:
  PostResult post_write(const WriteRequest& request) final;
  size_t poll(std::span<Completion> completions) final;

 protected:
  struct Batch {
    uint32_t writes = 0;  // with bytes
    uint32_t undelivered = 0;
    bool closed = false;
    DeadlineClock::TimePoint closed_at;
    std::vector<WriteRequest> signals;
  };
  using BatchPosition = std::list<Batch>::iterator;

  using SignalPolicy::SignalPolicy;

  /// Whether a fence keeps everything from being posted.
  virtual bool stalled() const = 0;
  /// Whether the batch of a write ends with it.
  virtual bool closes_batch(Ends ends) const = 0;
  /// Whether signals wait here until the bytes are delivered.
  virtual bool waits() const = 0;
  /// All writes of the batch are posted.
  virtual void on_closed(BatchPosition batch) = 0;
  /// They are delivered, too. Only if waits().
  virtual void on_delivered(BatchPosition batch) = 0;

  /// Lets the batch's signals go.
  void release(BatchPosition batch);

 private:
  /// A write of the caller's, until it is reported.
  struct Write {
    uint64_t context = 0;
    uint32_t incomplete = 0;  // requests
    bool failed = false;      // and reported
    BatchPosition batch;      // that waits for its bytes
  };

  uint32_t create(uint64_t context);
  PostResult post_bytes(const WriteRequest& request, uint32_t write);
  BatchPosition open_batch(uint32_t peer);
  /// Returns whether the caller gets to see it.
  bool take(Completion& completion);
  void post_due();

  std::list<Batch> batches_;
  std::unordered_map<uint32_t, BatchPosition> open_;  // by peer
  std::deque<WriteRequest> due_;                      // signals that may go, but found no room yet
  std::vector<Write> writes_;
  std::vector<uint32_t> free_;  // of writes_
};

/// Fences by waiting.
class WaitingSignals : public SeparateSignals {
 public:
  WaitingSignals(Fabric& fabric, const DeadlineClock& clock) : SeparateSignals(fabric), clock_(clock) {}

 protected:
  bool waits() const final { return true; }
  void on_closed(BatchPosition batch) final;
  void on_delivered(BatchPosition batch) final;

  uint32_t batches_waited_for() const { return waited_for_; }

 private:
  const DeadlineClock& clock_;
  uint32_t waited_for_ = 0;
};

class CoupledSignals final : public WaitingSignals {
 public:
  using WaitingSignals::WaitingSignals;
  SignalPolicyKind kind() const override { return SignalPolicyKind::kCoupled; }

 private:
  bool closes_batch(Ends ends) const override { return ends != Ends::kNothing; }
  bool stalled() const override { return batches_waited_for() > 0; }
};

class DecoupledSignals final : public WaitingSignals {
 public:
  using WaitingSignals::WaitingSignals;
  SignalPolicyKind kind() const override { return SignalPolicyKind::kDecoupled; }

 private:
  bool closes_batch(Ends ends) const override { return ends == Ends::kGroup; }
  bool stalled() const override { return false; }
};

/// Fences by the NIC: the first signal of a batch on each rail carries the flag, which covers those behind
/// it.
class NicOrderedSignals final : public SeparateSignals {
 public:
  /// Throws ConfigurationError if the fabric honours no fence.
  explicit NicOrderedSignals(Fabric& fabric);
  SignalPolicyKind kind() const override { return SignalPolicyKind::kNicOrdered; }

 private:
  bool closes_batch(Ends ends) const override { return ends == Ends::kGroup; }
  bool stalled() const override { return false; }
  bool waits() const override { return false; }
  void on_closed(BatchPosition batch) override;
  void on_delivered(BatchPosition) override {}
};

}  // namespace efa_ep
