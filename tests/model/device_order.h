// Devices that run whole halves one after another, as one thread or one stream does for several channels.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "search.h"

namespace efa_ep::model {

enum class Half : uint8_t { kDispatchSend, kDispatchRecv, kCombineSend, kCombineRecv };

struct HalfCall {
  uint32_t channel = 0;
  Half half = Half::kDispatchSend;
  auto operator<=>(const HalfCall&) const = default;
};

/// The half whose call does the step; none for the network's steps. combine_send does the node sums that are
/// ready, combine_recv the others. With one rank per node all are ready; else it is the worst case that none
/// is.
inline std::optional<Half> half_of(const Label& label, const Topology& topology) {
  switch (label.step) {
    case Step::kStage:
      if (label.operation == Operation::kDispatch) return Half::kDispatchSend;
      return topology.ranks_per_node == 1 ? Half::kCombineSend : Half::kCombineRecv;
    case Step::kProduce:
    case Step::kOffer:
      return Half::kDispatchSend;
    case Step::kForward:
    case Step::kPack:
      return Half::kDispatchRecv;
    case Step::kReturn:
      return Half::kCombineSend;
    case Step::kGather:
      return Half::kCombineRecv;
    case Step::kLand:
    case Step::kArrive:
    case Step::kComplete:
      return std::nullopt;
  }
  return std::nullopt;
}

/// Whether every rank gets through its `calls` (at most Progress::kMost rounds per channel). One run tells:
/// no step disables another, so all runs end alike.
inline bool all_calls_return(const ProtocolNet& net, const std::vector<std::vector<HalfCall>>& calls) {
  const Topology& topology = net.options().topology;
  std::map<std::tuple<uint32_t, HalfCall>, std::vector<uint32_t>> steps_of;
  for (uint32_t step = 0; step < net.steps().size(); ++step) {
    const Label& label = net.steps()[step].label;
    if (const auto half = half_of(label, topology))
      steps_of[{label.rank, {label.channel, *half}}].push_back(step);
  }
  Progress progress(net.steps().size());
  std::vector<size_t> returned(calls.size(), 0);
  std::map<std::tuple<uint32_t, HalfCall>, int> rounds;
  for (bool moved = true; moved;) {
    moved = false;
    for (uint32_t step = 0; step < net.steps().size(); ++step) {
      if (half_of(net.steps()[step].label, topology) || progress[step] == Progress::kMost) continue;
      if (can_run(net, progress, step)) {
        progress.advance(step);
        moved = true;
      }
    }
    for (uint32_t rank = 0; rank < calls.size(); ++rank) {
      if (returned[rank] == calls[rank].size()) continue;
      const HalfCall call = calls[rank][returned[rank]];
      int& round = rounds[{rank, call}];
      bool done = true;
      for (const uint32_t step : steps_of[{rank, call}]) {
        if (progress[step] == round && can_run(net, progress, step)) {
          progress.advance(step);
          moved = true;
        }
        done &= progress[step] > round;
      }
      if (done) {
        ++round;
        ++returned[rank];
        moved = true;
      }
    }
  }
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    if (returned[rank] < calls[rank].size()) return false;
  }
  return true;
}

}  // namespace efa_ep::model
