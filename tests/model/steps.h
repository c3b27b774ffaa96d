// The words of the model: steps of a round, signals between ranks, and what a model can leave out.
#pragma once

#include <algorithm>
#include <array>
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "protocol/immediate.h"
#include "protocol/topology.h"

namespace efa_ep::model {

/// In the order in which a round passes through them.
enum class Step : uint8_t {
  kProduce,   ///< rank writes its activations, in place
  kStage,     ///< rank fills its staging for `peer` (combine: with the node's sums) and posts the write; in
              ///< combine with one rank per node it posts its results
  kLand,      ///< network: the write from rank to `peer` moves the bytes to the slot
  kArrive,    ///< network: `peer` learns that this write is complete there
  kComplete,  ///< network: rank learns that its write is complete
  kOffer,     ///< rank lists its rows for local owner `peer` and sets the dispatch flag
  kForward,   ///< rank lists the rows of rail peer `peer` for local owner `owner` and sets the dispatch flag
  kPack,      ///< rank reads all rows for its experts; from here on these may write the results, in place
  kReturn,    ///< the results for source `peer` are complete; rank sets the result flag if others read them
  kGather,    ///< rank sums what has come back to it
};

/// What a rank waits for before a step, and what the checker can leave out.
enum class Signal : uint8_t {
  kNone,
  kDispatchArrival,
  kForwardedFlag,
  kLocalFlag,
  kRemoteResultFlag,
  kOwnNodeResultFlag,
  kCombineArrival,
  kDispatchCompletion,
  kCombineCompletion,
  kRoundEnd,
};
inline constexpr uint32_t kSignals = 10;
inline constexpr std::array<std::string_view, kSignals> kSignalNames = {"none",
                                                                        "arrival of dispatch",
                                                                        "dispatch flag of a forwarder",
                                                                        "dispatch flag of a local source",
                                                                        "result flag for a remote source",
                                                                        "result flag for the own node",
                                                                        "arrival of combine",
                                                                        "completion of dispatch",
                                                                        "completion of combine",
                                                                        "combine_recv before dispatch_send"};

/// What a pair without rows in a round leaves out; its reader is assumed to know that, and does not wait.
enum class Silence : uint8_t {
  kNever,    ///< nothing: the protocol
  kCombine,  ///< result flags and combine writes
  kBoth,     ///< those, dispatch flags and dispatch writes
};

/// A set of rounds: bit r for round r, bit 7 for all later ones too.
using RoundSet = uint8_t;
inline constexpr RoundSet kAllRounds = 0xFF;
constexpr bool contains(RoundSet rounds, int round) { return (rounds >> std::min(round, 7) & 1) != 0; }

struct NetOptions {
  Topology topology;
  uint32_t channels = 1;
  Signal removed = Signal::kNone;
  /// Whether staging belongs to the network until the write's completion (the contract of fabric.h), or only
  /// until its bytes have landed.
  bool staging_until_completion = true;
  Silence silence = Silence::kNever;
  std::vector<RoundSet> empty = {};  ///< [source rank][owner rank] rounds without rows; empty table: none
};

struct Label {
  Step step = Step::kStage;
  Operation operation = Operation::kDispatch;
  uint32_t channel = 0;
  uint32_t rank = 0;
  uint32_t peer = 0;
  uint32_t owner = 0;
  auto operator<=>(const Label&) const = default;
};

inline std::string rank_name(uint32_t rank, const Topology& topology) {
  std::string name = std::to_string(topology.node_of(rank));
  name.insert(name.begin(), '(');
  return name.append(",").append(std::to_string(topology.index_of(rank))).append(")");
}

/// The step as a sentence; ranks are (node, index).
inline std::string describe(const Label& label, const Topology& topology) {
  const bool dispatch = label.operation == Operation::kDispatch;
  const std::string operation = dispatch ? "dispatch" : "combine";
  const std::string rank = rank_name(label.rank, topology);
  const std::string peer = rank_name(label.peer, topology);
  switch (label.step) {
    case Step::kProduce:
      return rank + " produces its activations";
    case Step::kStage:
      return rank + (dispatch ? " stages rows" : " sums its node's results") + " for " + peer +
             " and posts the " + operation + " write";
    case Step::kLand:
      return "network: the " + operation + " write of " + rank + " lands at " + peer;
    case Step::kArrive:
      return "network: " + peer + " sees the arrival of the " + operation + " write of " + rank;
    case Step::kComplete:
      return "network: " + rank + " sees the completion of its " + operation + " write to " + peer;
    case Step::kOffer:
      return rank + " lists its rows for local owner " + peer;
    case Step::kForward:
      return rank + " lists the rows of " + peer + " for local owner " + rank_name(label.owner, topology);
    case Step::kPack:
      return rank + " packs the rows for its experts";
    case Step::kReturn:
      return rank + " has its results for source " + peer;
    case Step::kGather:
      return rank + " sums what came back to it";
  }
  return "";
}

}  // namespace efa_ep::model
