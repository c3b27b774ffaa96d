// The protocol as a net of steps: what waits for what, and who reads and writes which buffer.
//
// A step is the smallest piece of work that another party can tell apart: a write together with the flag that
// publishes it, a read, or something the network does on its own. Every step happens once per round. Steps of
// one half are unordered unless one needs the other, which covers every order in which a device may take
// them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "protocol/immediate.h"
#include "protocol/topology.h"
#include "steps.h"

namespace efa_ep::model {

class ProtocolNet {
 public:
  /// Round r of the step needs round r - lag of `step`, except in the rounds `skipped`.
  struct Wait {
    uint32_t step = 0;
    int lag = 0;
    RoundSet skipped = 0;
  };
  struct Read {
    uint32_t buffer = 0;
    RoundSet skipped = 0;
  };
  struct NetStep {
    Label label;
    std::vector<Wait> waits;
    std::vector<Read> reads;
    std::vector<uint32_t> writes;
  };
  struct Reader {
    uint32_t step = 0;
    RoundSet skipped = 0;
  };
  /// One writer fills it once a round, except in the rounds `skipped`. The flag or arrival word that
  /// announces the contents counts as part of them, since it carries their row count.
  struct Buffer {
    std::string name;
    uint32_t rank = 0;
    uint32_t writer = 0;
    std::vector<Reader> readers;
    RoundSet skipped = 0;
  };

  explicit ProtocolNet(const NetOptions& options) : options_(options), topology_(options.topology) {
    add_steps();
    for (uint32_t channel = 0; channel < options_.channels; ++channel) {
      for (uint32_t rank = 0; rank < topology_.world; ++rank) {
        connect_network(channel, rank);
        connect_dispatch(channel, rank);
        connect_combine(channel, rank);
        add_buffers(channel, rank);
      }
    }
  }

  const NetOptions& options() const { return options_; }
  const std::vector<NetStep>& steps() const { return steps_; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  /// How many waits `options().removed` took away; 0 if this shape has no such signal.
  uint32_t removed_waits() const { return removed_waits_; }

  std::string describe(uint32_t step) const {
    return channel_name(steps_[step].label.channel) + model::describe(steps_[step].label, topology_);
  }

 private:
  static constexpr Operation kDispatch = Operation::kDispatch;
  static constexpr Operation kCombine = Operation::kCombine;

  bool local(uint32_t a, uint32_t b) const { return topology_.node_of(a) == topology_.node_of(b); }
  /// The ranks with the index of `rank` on the other nodes.
  std::vector<uint32_t> rail(uint32_t rank) const {
    std::vector<uint32_t> peers;
    for (uint32_t node = 0; node < topology_.nodes(); ++node) {
      if (node != topology_.node_of(rank)) peers.push_back(topology_.rail_peer(rank, node));
    }
    return peers;
  }
  std::vector<uint32_t> node(uint32_t rank) const {
    std::vector<uint32_t> ranks;
    for (uint32_t index = 0; index < topology_.ranks_per_node; ++index) {
      ranks.push_back(topology_.rank_at(topology_.node_of(rank), index));
    }
    return ranks;
  }
  bool on_rail(uint32_t rank, uint32_t other) const {
    return !local(rank, other) && topology_.index_of(rank) == topology_.index_of(other);
  }

  /// Rounds in which `source` has no rows for `owner`, if `from` or more is left out then.
  RoundSet pair(Silence from, uint32_t source, uint32_t owner) const {
    if (options_.silence < from || options_.empty.empty()) return 0;
    return options_.empty[source * topology_.world + owner];
  }
  /// Likewise for all owners on the node of `member`.
  RoundSet pair_of_node(Silence from, uint32_t source, uint32_t member) const {
    RoundSet rounds = kAllRounds;
    for (const uint32_t owner : node(member)) rounds &= pair(from, source, owner);
    return rounds;
  }

  std::string channel_name(uint32_t channel) const {
    return options_.channels > 1 ? "channel " + std::to_string(channel) + ": " : "";
  }

  uint32_t id(const Label& label) const { return ids_.at(label); }
  uint32_t network(Step step, Operation operation, uint32_t channel, uint32_t from, uint32_t to) const {
    return id({step, operation, channel, from, to});
  }
  uint32_t produce(uint32_t channel, uint32_t rank) const {
    return id({Step::kProduce, kDispatch, channel, rank});
  }
  /// Lists the rows of `source` for `owner`, who is not on its rail, or is on its node.
  uint32_t list_writer(uint32_t channel, uint32_t source, uint32_t owner) const {
    if (local(source, owner)) return id({Step::kOffer, kDispatch, channel, source, owner});
    const uint32_t forwarder = topology_.rail_peer(source, topology_.node_of(owner));
    return id({Step::kForward, kDispatch, channel, forwarder, source, owner});
  }
  uint32_t pack(uint32_t channel, uint32_t rank) const { return id({Step::kPack, kDispatch, channel, rank}); }
  uint32_t results(uint32_t channel, uint32_t owner, uint32_t source) const {
    return id({Step::kReturn, kCombine, channel, owner, source});
  }
  uint32_t gather(uint32_t channel, uint32_t rank) const {
    return id({Step::kGather, kCombine, channel, rank});
  }

  void add_step(const Label& label) {
    ids_.emplace(label, static_cast<uint32_t>(steps_.size()));
    steps_.push_back({label, {}, {}, {}});
  }
  /// Program order of a device, or the course of a write through the network.
  void order(uint32_t step, uint32_t earlier, int lag = 0) {
    steps_[step].waits.push_back({earlier, lag, 0});
  }
  void wait(Signal signal, uint32_t step, uint32_t earlier, int lag = 0, RoundSet skipped = 0) {
    if (signal == options_.removed) {
      ++removed_waits_;
    } else {
      steps_[step].waits.push_back({earlier, lag, skipped});
    }
  }
  void add_buffer(std::string name, uint32_t rank, uint32_t writer, std::vector<Reader> readers,
                  RoundSet skipped) {
    const uint32_t buffer = static_cast<uint32_t>(buffers_.size());
    steps_[writer].writes.push_back(buffer);
    for (const Reader& reader : readers) steps_[reader.step].reads.push_back({buffer, reader.skipped});
    buffers_.push_back({std::move(name), rank, writer, std::move(readers), skipped});
  }

  void add_steps();
  void connect_network(uint32_t channel, uint32_t rank);
  void connect_dispatch(uint32_t channel, uint32_t rank);
  void connect_combine(uint32_t channel, uint32_t rank);
  void add_buffers(uint32_t channel, uint32_t rank);

  NetOptions options_;
  Topology topology_;
  std::map<Label, uint32_t> ids_;
  std::vector<NetStep> steps_;
  std::vector<Buffer> buffers_;
  uint32_t removed_waits_ = 0;
};

inline void ProtocolNet::add_steps() {
  // Step by step, not rank by rank: then one pass over the table can carry every rank through a whole round.
  const auto for_ranks = [&](const auto& add) {
    for (uint32_t channel = 0; channel < options_.channels; ++channel) {
      for (uint32_t rank = 0; rank < topology_.world; ++rank) add(channel, rank);
    }
  };
  const auto add_transfer = [&](Operation operation) {
    for (const Step step : {Step::kStage, Step::kLand, Step::kArrive, Step::kComplete}) {
      for_ranks([&](uint32_t channel, uint32_t rank) {
        for (const uint32_t peer : rail(rank)) add_step({step, operation, channel, rank, peer});
      });
    }
  };
  for_ranks([&](uint32_t channel, uint32_t rank) { add_step({Step::kProduce, kDispatch, channel, rank}); });
  add_transfer(kDispatch);
  for_ranks([&](uint32_t channel, uint32_t rank) {
    for (const uint32_t owner : node(rank)) add_step({Step::kOffer, kDispatch, channel, rank, owner});
  });
  for_ranks([&](uint32_t channel, uint32_t rank) {
    for (const uint32_t source : rail(rank)) {
      for (const uint32_t owner : node(rank)) {
        if (owner != rank) add_step({Step::kForward, kDispatch, channel, rank, source, owner});
      }
    }
  });
  for_ranks([&](uint32_t channel, uint32_t rank) { add_step({Step::kPack, kDispatch, channel, rank}); });
  for_ranks([&](uint32_t channel, uint32_t rank) {
    for (uint32_t source = 0; source < topology_.world; ++source) {
      add_step({Step::kReturn, kCombine, channel, rank, source});
    }
  });
  add_transfer(kCombine);
  for_ranks([&](uint32_t channel, uint32_t rank) { add_step({Step::kGather, kCombine, channel, rank}); });
}

inline void ProtocolNet::connect_network(uint32_t channel, uint32_t rank) {
  for (const Operation operation : {kDispatch, kCombine}) {
    for (const uint32_t peer : rail(rank)) {
      const uint32_t land = network(Step::kLand, operation, channel, rank, peer);
      order(land, network(Step::kStage, operation, channel, rank, peer));
      order(network(Step::kArrive, operation, channel, rank, peer), land);
      order(network(Step::kComplete, operation, channel, rank, peer), land);
    }
  }
}

inline void ProtocolNet::connect_dispatch(uint32_t channel, uint32_t rank) {
  const uint32_t first = produce(channel, rank);
  wait(Signal::kRoundEnd, first, gather(channel, rank), 1);
  if (options_.removed == Signal::kRoundEnd) {  // combine_send then comes first, combine_recv between
    for (uint32_t source = 0; source < topology_.world; ++source) {
      order(first, results(channel, rank, source), 1);
    }
  }
  std::vector<uint32_t> send;
  for (const uint32_t peer : rail(rank)) {
    send.push_back(network(Step::kStage, kDispatch, channel, rank, peer));
  }
  for (const uint32_t owner : node(rank)) {  // the lists name staged rows
    for (const uint32_t peer : rail(rank)) {
      order(list_writer(channel, rank, owner), network(Step::kStage, kDispatch, channel, rank, peer));
    }
    send.push_back(list_writer(channel, rank, owner));
  }
  for (const uint32_t step : send) order(step, first);

  std::vector<uint32_t> receive = {pack(channel, rank)};
  for (const uint32_t source : rail(rank)) {
    const RoundSet skipped = pair_of_node(Silence::kBoth, source, rank);
    const uint32_t arrival = network(Step::kArrive, kDispatch, channel, source, rank);
    wait(Signal::kDispatchArrival, pack(channel, rank), arrival, 0, skipped);
    wait(Signal::kCombineCompletion, pack(channel, rank),
         network(Step::kComplete, kCombine, channel, rank, source), 1);
    for (const uint32_t owner : node(rank)) {
      if (owner == rank) continue;
      const uint32_t forward = list_writer(channel, source, owner);
      wait(Signal::kDispatchArrival, forward, arrival, 0, skipped);
      order(pack(channel, rank), forward);
      receive.push_back(forward);
    }
  }
  for (const uint32_t step : receive) {
    for (const uint32_t earlier : send) order(step, earlier);
    if (options_.removed == Signal::kRoundEnd) order(step, gather(channel, rank), 1);
  }
  for (uint32_t source = 0; source < topology_.world; ++source) {
    if (source == rank || on_rail(rank, source)) continue;
    wait(local(rank, source) ? Signal::kLocalFlag : Signal::kForwardedFlag, pack(channel, rank),
         list_writer(channel, source, rank), 0, pair(Silence::kBoth, source, rank));
  }
}

inline void ProtocolNet::connect_combine(uint32_t channel, uint32_t rank) {
  for (uint32_t source = 0; source < topology_.world; ++source) {
    order(results(channel, rank, source), pack(channel, rank));
    order(gather(channel, rank), results(channel, rank, source));
  }
  for (const uint32_t source : rail(rank)) {
    const uint32_t stage = network(Step::kStage, kCombine, channel, rank, source);
    order(stage, results(channel, rank, source));
    order(gather(channel, rank), stage);
    for (const uint32_t owner : node(rank)) {
      if (owner == rank) continue;
      wait(Signal::kRemoteResultFlag, stage, results(channel, owner, source), 0,
           pair(Silence::kCombine, source, owner));
    }
    wait(Signal::kCombineArrival, gather(channel, rank),
         network(Step::kArrive, kCombine, channel, source, rank), 0,
         pair_of_node(Silence::kCombine, rank, source));
    wait(Signal::kDispatchCompletion, gather(channel, rank),
         network(Step::kComplete, kDispatch, channel, rank, source));
  }
  for (const uint32_t owner : node(rank)) {
    if (owner == rank) continue;
    wait(Signal::kOwnNodeResultFlag, gather(channel, rank), results(channel, owner, rank), 0,
         pair(Silence::kCombine, rank, owner));
  }
}

inline void ProtocolNet::add_buffers(uint32_t channel, uint32_t rank) {
  const auto rank_name = [&](uint32_t other) { return model::rank_name(other, topology_); };
  const auto name = [&](const std::string& kind, uint32_t other) {
    return channel_name(channel) + kind + rank_name(other) + " at " + rank_name(rank);
  };
  /// The network reads what a write carries, until it has landed or until the completion.
  const auto add_network_readers = [&](std::vector<Reader>& readers, Operation operation, uint32_t peer,
                                       RoundSet skipped) {
    readers.push_back({network(Step::kLand, operation, channel, rank, peer), skipped});
    if (options_.staging_until_completion) {
      readers.push_back({network(Step::kComplete, operation, channel, rank, peer), skipped});
    }
  };
  /// Owners on this node read the rows of `source` when they pack them, and their routing until they return
  /// the results.
  const auto add_owners = [&](std::vector<Reader>& readers, uint32_t source, RoundSet not_filled) {
    for (const uint32_t owner : node(rank)) {
      readers.push_back(
          {pack(channel, owner), static_cast<RoundSet>(pair(Silence::kBoth, source, owner) | not_filled)});
      readers.push_back({results(channel, owner, source),
                         static_cast<RoundSet>(pair(Silence::kCombine, source, owner) | not_filled)});
    }
  };
  std::vector<Reader> of_activations;
  add_owners(of_activations, rank, 0);
  for (const uint32_t peer : rail(rank)) {
    const RoundSet out = pair_of_node(Silence::kBoth, rank, peer);
    add_network_readers(of_activations, kDispatch, peer, out);

    std::vector<Reader> of_staging;
    add_owners(of_staging, rank, out);
    add_network_readers(of_staging, kDispatch, peer, out);
    add_buffer(name("dispatch staging for ", peer), rank,
               network(Step::kStage, kDispatch, channel, rank, peer), of_staging, out);

    const RoundSet there = pair_of_node(Silence::kBoth, peer, rank);
    const RoundSet back = pair_of_node(Silence::kCombine, peer, rank);
    std::vector<Reader> of_slot = {{network(Step::kStage, kCombine, channel, rank, peer), back}};
    add_owners(of_slot, peer, there);
    for (const uint32_t owner : node(rank)) {
      if (owner != rank) of_slot.push_back({list_writer(channel, peer, owner), there});
    }
    add_buffer(name("dispatch slot of ", peer), rank, network(Step::kLand, kDispatch, channel, peer, rank),
               of_slot, there);

    if (topology_.ranks_per_node > 1) {
      std::vector<Reader> of_sums;
      add_network_readers(of_sums, kCombine, peer, back);
      add_buffer(name("combine staging for ", peer), rank,
                 network(Step::kStage, kCombine, channel, rank, peer), of_sums, back);
    }
    const RoundSet returned = pair_of_node(Silence::kCombine, rank, peer);
    add_buffer(name("combine slot of ", peer), rank, network(Step::kLand, kCombine, channel, peer, rank),
               {{gather(channel, rank), returned}}, returned);
  }
  add_buffer(name("activations of ", rank), rank, produce(channel, rank), of_activations, 0);

  for (uint32_t source = 0; source < topology_.world; ++source) {
    const RoundSet there = pair(Silence::kBoth, source, rank);
    const RoundSet back = pair(Silence::kCombine, source, rank);
    if (!on_rail(rank, source)) {
      add_buffer(name("row list of ", source), rank, list_writer(channel, source, rank),
                 {{pack(channel, rank), there}, {results(channel, rank, source), back}}, there);
    }
    // Both the results, which experts may write in place as soon as the rows are packed, and the flag.
    const uint32_t rail_rank = topology_.rail_peer(source, topology_.node_of(rank));
    std::vector<Reader> of_results;
    if (source == rail_rank) {
      of_results.push_back({gather(channel, source), back});
    } else if (topology_.ranks_per_node > 1) {
      of_results.push_back({network(Step::kStage, kCombine, channel, rail_rank, source), back});
    } else {
      add_network_readers(of_results, kCombine, source, back);
    }
    add_buffer(name("results for ", source), rank, pack(channel, rank), of_results, back);
    if (rail_rank != rank) {
      add_buffer(name("result flag for ", source), rail_rank, results(channel, rank, source), of_results,
                 back);
    }
  }
}

}  // namespace efa_ep::model
