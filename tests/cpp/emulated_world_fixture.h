// Worlds on an emulated network against world_plan.h.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulated_fixture.h"
#include "testing/emulated_world.h"
#include "world_plan.h"

namespace efa_ep {

/// Rounds of a plan. Checks all that a rank gets, bit for bit.
class PlannedWorkload final : public EmulatedWorkload {
 public:
  /// All channels run the same plan, each from its own memory.
  PlannedWorkload(const WorldConfig& config, uint32_t rounds) : config_(config) {
    Planner planner(config);
    for (uint32_t round = 0; round < rounds; ++round) plans_.push_back(planner.plan());
  }

  DispatchInput tokens(const EmulatedTurn& turn) override {
    const RankRound& round = plan(turn);
    const size_t row = config_.layout.row.payload_bytes;
    const std::byte* x = round.x.data();
    size_t stride = row;
    if (config_.in_place) {
      std::byte* activations = world_->device(turn.rank).activations(turn.channel);
      stride = config_.layout.dispatch_row();
      for (uint32_t token = 0; token < round.tokens; ++token) {
        std::copy_n(x + token * row, row, activations + token * stride);
      }
      x = activations;
    }
    return {.x = x,
            .x_stride = stride,
            .scales = round.scales.data(),
            .ids = round.ids.data(),
            .ids_are_64_bit = true,
            .weights = round.weights.data(),
            .tokens = round.tokens};
  }
  DispatchOutput receive(const EmulatedTurn& turn, uint32_t rows) override {
    const RankRound& round = plan(turn);
    EXPECT_EQ(rows, round.rows) << text(turn);
    Buffers& buffers = buffers_of(turn);
    buffers.x.assign(round.received_x.size(), kUntouched);
    buffers.scales.assign(round.received_scales.size(), kUntouched);
    buffers.ids.assign(round.received_ids.size(), -7);
    buffers.weights.assign(round.received_weights.size(), -7.0f);
    buffers.tokens_per_expert.assign(round.tokens_per_expert.size(), -7);
    return {.x = buffers.x.data(),
            .scales = buffers.scales.data(),
            .ids = buffers.ids.data(),
            .weights = buffers.weights.data(),
            .tokens_per_expert = buffers.tokens_per_expert.data()};
  }
  CombineInput results(const EmulatedTurn& turn) override {
    const RankRound& round = plan(turn);
    const Buffers& buffers = buffers_of(turn);
    // Equality first: a gtest comparison of whole buffers is slow to set up, and worlds are many.
    if (buffers.x != round.received_x || buffers.scales != round.received_scales ||
        buffers.ids != round.received_ids || buffers.weights != round.received_weights ||
        buffers.tokens_per_expert != round.tokens_per_expert) {
      ADD_FAILURE() << text(turn) << ": received rows differ from the plan";
    }
    const std::byte* rows = round.expert_rows.data();
    if (config_.in_place && !config_.per_expert && !config_.per_slot) {
      std::byte* results = world_->device(turn.rank).results(turn.channel);
      std::copy(round.expert_rows.begin(), round.expert_rows.end(), results);
      rows = results;
    }
    return {.rows = rows, .per_slot = config_.per_slot, .weights_applied = config_.weights_applied};
  }
  std::byte* output(const EmulatedTurn& turn) override {
    Buffers& buffers = buffers_of(turn);
    buffers.out.assign(plan(turn).out.size(), kUntouched);
    return buffers.out.data();
  }
  void finished(const EmulatedTurn& turn) override {
    if (buffers_of(turn).out != plan(turn).out)
      ADD_FAILURE() << text(turn) << ": output differs from the plan";
    ++finished_;
  }

  /// Whose devices say where in-place activations and results lie.
  void use(EmulatedWorld& world) { world_ = &world; }
  uint64_t finished_turns() const { return finished_; }
  const RankRound& plan(const EmulatedTurn& turn) const { return plans_.at(turn.round - 1)[turn.rank]; }

 private:
  struct Buffers {
    Bytes x, scales, out;
    std::vector<int32_t> ids, tokens_per_expert;
    std::vector<float> weights;
  };
  Buffers& buffers_of(const EmulatedTurn& turn) { return buffers_[{turn.rank, turn.channel}]; }
  static std::string text(const EmulatedTurn& turn) {
    return "rank " + std::to_string(turn.rank) + ", channel " + std::to_string(turn.channel) + ", round " +
           std::to_string(turn.round);
  }

  const WorldConfig config_;
  EmulatedWorld* world_ = nullptr;
  std::vector<std::vector<RankRound>> plans_;  // [round][rank]
  std::map<std::pair<uint32_t, uint32_t>, Buffers> buffers_;
  uint64_t finished_ = 0;
};

inline EmulatedWorldOptions options_of(const WorldConfig& config, const EmulatedProfile& profile) {
  EmulatedWorldOptions options;
  options.layout = config.layout;
  options.expert_owner = config.expert_owner;
  options.combine_type = config.combine_type;
  options.per_expert = config.per_expert;
  options.chunk_bytes = config.chunk_bytes;
  options.ring_commands = 1 << 16;
  options.network = {.profile = profile, .seed = config.seed, .check_sources = true};
  return options;
}

/// Two experts per rank, dealt out in turn, and rows of a few elements.
inline WorldConfig emulated_config(uint32_t nodes, uint32_t ranks_per_node, uint64_t seed) {
  WorldConfig config;
  config.layout.topology = {nodes * ranks_per_node, ranks_per_node};
  config.layout.row = {.top_k = 3, .payload_bytes = 48, .scale_bytes = 4, .combine_bytes = 32};
  config.layout.max_tokens = 4;
  for (uint32_t expert = 0; expert < 2 * config.world(); ++expert) {
    config.expert_owner.push_back(expert % config.world());
  }
  config.in_place = true;
  config.seed = seed;
  return config;
}

inline std::string error_text(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& caught) {
    return caught.what();
  }
  return "";
}

inline void expect_success(EmulatedWorld& world, uint32_t ranks) {
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(error_text(world.error(rank)), "") << "rank " << rank;
    EXPECT_EQ(world.network().counters(rank).changed_sources, 0U);
    EXPECT_EQ(world.network().counters(rank).posted, world.network().counters(rank).completed);
  }
}

}  // namespace efa_ep
