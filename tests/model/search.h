// Search over all runs of a ProtocolNet for one that breaks the safety rule or gets stuck.
//
// In an unbounded search only differences between steps count: once every step has done a round, that round
// is forgotten, so a finite set of states stands for runs of any length. docs/protocol_model.md justifies the
// reduction behind Visible.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "progress.h"
#include "protocol_net.h"

namespace efa_ep::model {

/// A step in a round (from 1).
struct Firing {
  uint32_t step = 0;
  uint32_t round = 0;
};

struct Violation {
  std::string what;
  std::vector<Firing> trace;  ///< what leads to it, and nothing else
};

struct SearchResult {
  std::optional<Violation> violation;
  bool complete = true;  ///< false: the limit on states ended the search
  bool runaway = false;  ///< some step can get more than Progress::kMost rounds ahead of another
  uint64_t states = 0;
  uint64_t transitions = 0;
};

/// One buffer and one of the steps that read it. The safety rule is a conjunction over these.
struct BufferUse {
  uint32_t buffer = 0;
  uint32_t reader = 0;
};

/// Whether nothing keeps the step from its next round.
inline bool can_run(const ProtocolNet& net, const Progress& progress, uint32_t step) {
  const int round = progress[step] + 1;
  for (const auto& wait : net.steps()[step].waits) {
    if (progress[wait.step] < round - wait.lag && !contains(wait.skipped, round)) return false;
  }
  return true;
}

/// The safety rule for a step that is about to run: it overwrites only what all readers of the old data are
/// done with, and reads only data of its own round. `only` restricts the rule to one use.
inline std::optional<std::string> broken_rule(const ProtocolNet& net, const Progress& progress, uint32_t step,
                                              std::optional<BufferUse> only = std::nullopt) {
  const int round = progress[step] + 1;
  const auto last_filled = [](const ProtocolNet::Buffer& buffer, int before) {
    while (before > 0 && contains(buffer.skipped, before)) --before;
    return before;
  };
  for (const uint32_t id : net.steps()[step].writes) {
    const auto& buffer = net.buffers()[id];
    if ((only && id != only->buffer) || contains(buffer.skipped, round)) continue;
    const int old = last_filled(buffer, round - 1);
    for (const auto& reader : buffer.readers) {
      if (only && reader.step != only->reader) continue;
      if (progress[reader.step] < old && !contains(reader.skipped, old)) {
        return "this overwrites the " + buffer.name + " before: " + net.describe(reader.step);
      }
    }
  }
  for (const auto& read : net.steps()[step].reads) {
    const auto& buffer = net.buffers()[read.buffer];
    if (only && (read.buffer != only->buffer || step != only->reader)) continue;
    if (contains(read.skipped, round)) continue;
    const int found = last_filled(buffer, progress[buffer.writer]);
    if (found != round) {
      return "this reads the " + buffer.name + (found < round ? " before: " : " after the next round's: ") +
             net.describe(buffer.writer);
    }
  }
  return std::nullopt;
}

struct SearchOptions {
  bool unbounded = true;  ///< false: runs of Progress::kMost rounds
  /// Checks this use only; steps other than its two then run at once, without alternatives.
  std::optional<BufferUse> use = std::nullopt;
  uint64_t max_states = std::numeric_limits<uint32_t>::max();
};

/// Breadth first, so that the first violation found is one of the shortest.
class Search {
 public:
  Search(const ProtocolNet& net, const SearchOptions& options)
      : net_(net), options_(options), visible_(net.steps().size(), !options.use) {
    if (!options.use) return;
    visible_[net.buffers()[options.use->buffer].writer] = true;
    visible_[options.use->reader] = true;
  }

  SearchResult run() {
    Progress progress(net_.steps().size());
    settle(progress, nullptr);
    StateSet states(progress);
    Progress next = progress;
    for (size_t state = 0; state < states.size(); ++state) {
      states.read(state, progress);
      bool stuck = true;
      for (uint32_t step = 0; step < progress.size(); ++step) {
        if (!can_run(net_, progress, step)) continue;
        stuck = false;
        if (!visible_[step] || !below_limit(progress, step)) continue;
        ++result_.transitions;
        if (const auto rule = broken_rule(net_, progress, step, options_.use)) {
          return end(states, Violation{*rule, causes(path_to(states, state, step))});
        }
        next = progress;
        next.advance(step);
        settle(next, nullptr);
        states.insert(next, static_cast<uint32_t>(state), step);
      }
      if (stuck) {
        return end(states, Violation{"deadlock: no step can run", path_to(states, state, std::nullopt)});
      }
      if (states.size() > options_.max_states) {
        result_.complete = false;
        break;
      }
    }
    return end(states, std::nullopt);
  }

 private:
  SearchResult end(const StateSet& states, std::optional<Violation> violation) {
    result_.states = states.size();
    result_.violation = std::move(violation);
    return result_;
  }

  bool below_limit(const Progress& progress, uint32_t step) {
    if (progress[step] < Progress::kMost) return true;
    result_.runaway |= options_.unbounded;
    return false;
  }

  /// Runs every invisible step as far as it can go: no step disables another, so order does not matter.
  /// Returns the rounds forgotten afterwards.
  uint32_t settle(Progress& progress, std::vector<Firing>* fired) {
    for (bool moved = options_.use.has_value(); moved;) {
      moved = false;
      for (uint32_t step = 0; step < progress.size(); ++step) {
        while (!visible_[step] && can_run(net_, progress, step) && below_limit(progress, step)) {
          progress.advance(step);
          moved = true;
          if (fired != nullptr) fired->push_back({step, static_cast<uint32_t>(progress[step])});
        }
      }
    }
    return options_.unbounded ? progress.lower() : 0;
  }

  /// The run that led to `state`, with `last` after it.
  std::vector<Firing> path_to(const StateSet& states, size_t state, std::optional<uint32_t> last) {
    std::vector<uint32_t> choices;
    for (size_t s = state; states.parent(s) != StateSet::kNoParent; s = states.parent(s)) {
      choices.push_back(states.step(s));
    }
    std::vector<Firing> fired;
    Progress progress(net_.steps().size());
    uint32_t forgotten = 0;
    const auto replay = [&](std::optional<uint32_t> choice) {
      const size_t first = fired.size();
      if (choice) {
        progress.advance(*choice);
        fired.push_back({*choice, static_cast<uint32_t>(progress[*choice])});
      }
      const uint32_t rounds = settle(progress, &fired);
      for (size_t i = first; i < fired.size(); ++i) fired[i].round += forgotten;
      forgotten += rounds;
    };
    replay(std::nullopt);
    for (auto choice = choices.rbegin(); choice != choices.rend(); ++choice) replay(*choice);
    if (last) fired.push_back({*last, static_cast<uint32_t>(progress[*last]) + 1 + forgotten});
    return fired;
  }

  /// The part of a run that its last firing needs, directly or not.
  std::vector<Firing> causes(const std::vector<Firing>& run) const {
    std::vector<int> needed(net_.steps().size(), 0);  // rounds of every step
    needed[run.back().step] = static_cast<int>(run.back().round);
    std::vector<Firing> kept;
    for (auto firing = run.rbegin(); firing != run.rend(); ++firing) {
      const int round = static_cast<int>(firing->round);
      if (round > needed[firing->step]) continue;
      kept.push_back(*firing);
      for (const auto& wait : net_.steps()[firing->step].waits) {
        if (!contains(wait.skipped, round)) needed[wait.step] = std::max(needed[wait.step], round - wait.lag);
      }
    }
    std::reverse(kept.begin(), kept.end());
    return kept;
  }

  const ProtocolNet& net_;
  const SearchOptions options_;
  std::vector<bool> visible_;
  SearchResult result_;
};

/// Every interleaving of all steps.
inline SearchResult search_all(const ProtocolNet& net, const SearchOptions& options = {}) {
  return Search(net, options).run();
}

/// Buffer by buffer, and reader by reader; reports the violation with the shortest trace. `rank` restricts it
/// to one rank's buffers: all ranks are alike unless pairs are empty.
inline SearchResult search_buffers(const ProtocolNet& net, bool unbounded = true,
                                   std::optional<uint32_t> rank = std::nullopt) {
  SearchResult total;
  for (uint32_t buffer = 0; buffer < net.buffers().size(); ++buffer) {
    if (rank && net.buffers()[buffer].rank != *rank) continue;
    for (const auto& reader : net.buffers()[buffer].readers) {
      SearchResult one = Search(net, {.unbounded = unbounded, .use = BufferUse{buffer, reader.step}}).run();
      total.complete &= one.complete;
      total.runaway |= one.runaway;
      total.states += one.states;
      total.transitions += one.transitions;
      if (one.violation &&
          (!total.violation || one.violation->trace.size() < total.violation->trace.size())) {
        total.violation = std::move(one.violation);
      }
    }
  }
  return total;
}

/// One run of `rounds` rounds: every step has a random priority, and the most urgent one that can run does.
/// That starves some steps for as long as the protocol permits. Returns the rule it broke, if any.
inline std::optional<std::string> random_run(const ProtocolNet& net, uint32_t rounds,
                                             std::mt19937_64& random) {
  std::vector<uint32_t> by_urgency(net.steps().size());
  for (uint32_t step = 0; step < by_urgency.size(); ++step) by_urgency[step] = step;
  std::shuffle(by_urgency.begin(), by_urgency.end(), random);
  Progress progress(net.steps().size());
  for (uint32_t done = 0; done < rounds; done += progress.lower()) {
    const auto next = std::find_if(by_urgency.begin(), by_urgency.end(), [&](uint32_t step) {
      return progress[step] < Progress::kMost && can_run(net, progress, step);
    });
    if (next == by_urgency.end()) return "deadlock: no step can run";
    if (const auto rule = broken_rule(net, progress, *next)) return rule;
    progress.advance(*next);
  }
  return std::nullopt;
}

}  // namespace efa_ep::model
