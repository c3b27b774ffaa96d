#include "proxy/signal_policy.h"

#include "errors.h"
#include "proxy/separate_signals.h"

namespace efa_ep {
namespace {

/// The write carries its signal: the fabric's own promise is all that is needed.
class CountedSignals final : public SignalPolicy {
 public:
  explicit CountedSignals(Fabric& fabric) : SignalPolicy(fabric) {}
  SignalPolicyKind kind() const override { return SignalPolicyKind::kCounted; }
  PostResult post_write(const WriteRequest& request) override { return fabric_.post_write(request); }
  size_t poll(std::span<Completion> completions) override { return fabric_.poll(completions); }
};

}  // namespace

const char* name_of(SignalPolicyKind kind) {
  switch (kind) {
    case SignalPolicyKind::kCounted:
      return "counted";
    case SignalPolicyKind::kCoupled:
      return "coupled";
    case SignalPolicyKind::kDecoupled:
      return "decoupled";
    case SignalPolicyKind::kNicOrdered:
      return "nic_ordered";
  }
  return "";
}

SignalPolicyKind signal_policy_named(const std::string& name) {
  std::string choices;
  for (const SignalPolicyKind kind : kSignalPolicies) {
    if (name == name_of(kind)) return kind;
    choices += (choices.empty() ? "" : ", ") + std::string(name_of(kind));
  }
  throw ConfigurationError("EFA_EP_SIGNAL_POLICY is \"" + name + "\"; use one of " + choices);
}

std::unique_ptr<SignalPolicy> SignalPolicy::create(SignalPolicyKind kind, Fabric& fabric,
                                                   const DeadlineClock& clock) {
  switch (kind) {
    case SignalPolicyKind::kCoupled:
      return std::make_unique<CoupledSignals>(fabric, clock);
    case SignalPolicyKind::kDecoupled:
      return std::make_unique<DecoupledSignals>(fabric, clock);
    case SignalPolicyKind::kNicOrdered:
      return std::make_unique<NicOrderedSignals>(fabric);
    case SignalPolicyKind::kCounted:
      break;
  }
  return std::make_unique<CountedSignals>(fabric);
}

SignalCounters SignalPolicy::counters() const {
  const auto read = [](const std::atomic<uint64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  return {read(fences_), read(waits_), read(signals_), read(stall_ns_)};
}

}  // namespace efa_ep
