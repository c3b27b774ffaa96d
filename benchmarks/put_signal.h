// The put + signal micro-benchmark: what a way of signalling leaves of the bandwidth of bare puts.
//
// As in Perseus (arXiv 2605.00686): every rank issues `transfers` puts of `bytes` bytes at once, dealt out to
// all other ranks, one group per destination. A run ends when every rank's puts are complete and, with
// signals, it has seen the signals of all others. Time is the slowest rank's.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "clock.h"
#include "fabric/fabric.h"
#include "proxy/signal_policy.h"
#include "proxy/tile_puts.h"

namespace efa_ep::put_signal {

struct Cell {
  uint32_t ranks = 2;
  uint32_t transfers = 1;
  uint32_t bytes = 4096;
};

/// A signal policy, or none: bare puts.
using Method = std::optional<SignalPolicyKind>;
inline constexpr Method kPutOnly = std::nullopt;

struct Result {
  double seconds = 0;      ///< of one run, the median
  double share = 1;        ///< of put-only bandwidth
  double share_error = 0;  ///< how far off that may be
  uint32_t runs = 0;       ///< of each method
  uint64_t fences = 0;     ///< rank 0's, in one run
};

/// Memory that a rank needs: places to put from, and places to put to. Puts share places; no byte is checked.
constexpr uint32_t kPlaces = 8;
constexpr size_t memory_bytes(uint32_t largest_transfer) { return size_t{2} * kPlaces * largest_transfer; }

/// One rank, with one method, on a connected fabric that carries nothing else.
class Rank {
 public:
  Rank(Fabric& fabric, Method method, const Cell& cell, uint32_t rank, const DeadlineClock& clock);

  /// Submits the puts of a run.
  void begin();
  /// Does some work. Returns whether anything moved.
  bool step() { return tiles_->drive(); }
  bool finished() const;

  SignalCounters counters() const { return policy_ ? policy_->counters() : SignalCounters{}; }

 private:
  uint32_t transfers_to(uint32_t source, uint32_t peer) const;

  const Cell cell_;
  const uint32_t rank_;
  uint32_t run_ = 0;
  std::unique_ptr<SignalPolicy> policy_;
  std::unique_ptr<Fabric> silent_;  // instead of a policy
  std::vector<uint64_t> words_;
  std::unique_ptr<TilePuts> tiles_;
};

/// All methods, one after the other, on `cell.ranks` ranks of an emulated network, in virtual time.
/// `honours_fence` adds fences to the profile, which no EFA has.
std::vector<Result> measure_emulated(const char* profile, bool honours_fence, const Cell& cell,
                                     std::span<const Method> methods);

/// All cells, which have the same number of ranks, in as many processes over libfabric on the loopback
/// interface; results by cell and method. The methods take turns. A share is the median, over all turns, of
/// the method's bandwidth by that of the same turn's bare puts, so that what comes and goes on the machine
/// is in both. A cell is repeated until its shares are exact to 1 %, or it has taken its time.
std::vector<std::vector<Result>> measure_processes(const char* provider, std::span<const Cell> cells,
                                                   std::span<const Method> methods);

}  // namespace efa_ep::put_signal
