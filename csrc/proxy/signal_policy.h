// How a write's completion signal is ordered behind the write's bytes.
//
// The protocol and tile puts need one promise: when an immediate arrives, its write's bytes are there. Four
// ways to keep it are known (Perseus, arXiv 2605.00686, compares the first three):
//
//   counted      the write carries its signal as immediate data; the receiver counts. No fence, no request
//                for the signal, no wait: the fabric keeps the promise
//   coupled      write, wait until it is delivered, signal; nothing else is posted meanwhile. One fence per
//                transfer: what a put with signal costs on a proxy that cannot do better
//   decoupled    the writes of one destination's group, one wait for all of them, then their signals. Other
//                destinations go on meanwhile, which Perseus' proxy does not allow
//   nic_ordered  the writes of one destination's group, then their signals, the first of which carries the
//                NIC's fence flag (one per rail): the proxy never waits. Only on fabrics that honour fences;
//                EFA does not
//
// A policy is itself a Fabric, put between a fabric and whoever uses it (Proxy, TilePuts). Neither knows
// which policy serves it, every test of a fabric is a test of a policy, and ranks may use different ones.
//
// Where a signal is a request of its own, it is a write without bytes that carries the immediate, on the rail
// of its data. It is not a put of a signal word: Fabric promises nothing about the order in which the bytes
// of a word become visible, so a reader could see half of one. On EFA a signal request is one more work
// request.
//
// The Proxy posts every chunk as its own group (Ends::kGroup), because its chunks come from the device one by
// one; on its path `decoupled` therefore waits once per chunk, though other chunks do not wait for that.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "clock.h"
#include "fabric/fabric.h"

namespace efa_ep {

enum class SignalPolicyKind : uint8_t { kCounted, kCoupled, kDecoupled, kNicOrdered };
inline constexpr SignalPolicyKind kSignalPolicies[] = {SignalPolicyKind::kCounted, SignalPolicyKind::kCoupled,
                                                       SignalPolicyKind::kDecoupled,
                                                       SignalPolicyKind::kNicOrdered};

/// "counted", "coupled", "decoupled" or "nic_ordered".
const char* name_of(SignalPolicyKind kind);
/// The policy with that name. Throws ConfigurationError.
SignalPolicyKind signal_policy_named(const std::string& name);

/// Totals since the start; all monotone.
struct SignalCounters {
  uint64_t fences = 0;    ///< times an order between bytes and signals was imposed, by waiting or by the NIC
  uint64_t waits = 0;     ///< fences by waiting that found writes not delivered yet
  uint64_t signals = 0;   ///< requests that carried a signal and no bytes
  uint64_t stall_ns = 0;  ///< time in which a fence kept the proxy from posting anything
};

class SignalPolicy : public Fabric {
 public:
  /// A policy of this kind over `fabric`; stall time is `clock`'s. Both outlive it. Throws ConfigurationError
  /// if the fabric cannot serve the policy.
  static std::unique_ptr<SignalPolicy> create(SignalPolicyKind kind, Fabric& fabric,
                                              const DeadlineClock& clock = kSteadyClock);

  virtual SignalPolicyKind kind() const = 0;
  /// May be called in any thread.
  SignalCounters counters() const;

  const FabricDescription& description() const override { return fabric_.description(); }
  void register_memory(std::byte* base, size_t bytes) override { fabric_.register_memory(base, bytes); }
  void register_device_memory(const DeviceRange& range) override { fabric_.register_device_memory(range); }
  std::vector<std::byte> address() const override { return fabric_.address(); }
  void connect(uint32_t peer, std::span<const std::byte> address) override { fabric_.connect(peer, address); }

 protected:
  explicit SignalPolicy(Fabric& fabric) : fabric_(fabric) {}

  // Only the thread that uses the fabric writes counters; readers may be anywhere.
  static void add(std::atomic<uint64_t>& counter, uint64_t amount) {
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
  }

  Fabric& fabric_;
  std::atomic<uint64_t> fences_{0}, waits_{0}, signals_{0}, stall_ns_{0};
};

}  // namespace efa_ep
