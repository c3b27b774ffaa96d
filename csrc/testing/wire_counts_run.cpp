#include "testing/wire_counts_run.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "testing/emulated_world.h"

namespace efa_ep::wire_counts {
namespace {

/// Computes nothing: activations and results are what the arenas hold, and what leaves them is dropped.
class Idle final : public EmulatedWorkload {
 public:
  Idle(const Shape& shape, const Layout& layout, uint64_t seed)
      : layout_(layout),
        x_(layout.result_rows() * layout.row.payload_bytes),
        scales_(layout.result_rows() * std::max(1u, layout.row.scale_bytes)),
        out_(size_t{layout.max_tokens} * layout.row.combine_bytes),
        received_ids_(layout.result_rows() * layout.row.top_k),
        received_weights_(received_ids_.size()),
        weights_(size_t{shape.tokens} * shape.top_k, 1.0f),
        tokens_per_expert_(shape.experts) {
    std::mt19937_64 random(seed);
    std::vector<int32_t> experts(shape.experts);
    std::iota(experts.begin(), experts.end(), 0);
    for (uint32_t token = 0; token < shape.ranks * shape.tokens; ++token) {
      std::shuffle(experts.begin(), experts.end(), random);
      ids_.insert(ids_.end(), experts.begin(), experts.begin() + shape.top_k);
    }
  }
  void use(EmulatedWorld& world) { world_ = &world; }

  DispatchInput tokens(const EmulatedTurn& turn) override {
    return {.x = world_->device(turn.rank).activations(turn.channel),
            .x_stride = layout_.dispatch_row(),
            .scales = scales_.data(),
            .ids = ids_.data() + turn.rank * weights_.size(),
            .weights = weights_.data(),
            .tokens = layout_.max_tokens};
  }
  DispatchOutput receive(const EmulatedTurn&, uint32_t) override {
    return {.x = x_.data(),
            .scales = scales_.data(),
            .ids = received_ids_.data(),
            .weights = received_weights_.data(),
            .tokens_per_expert = tokens_per_expert_.data()};
  }
  CombineInput results(const EmulatedTurn& turn) override {
    return {.rows = world_->device(turn.rank).results(turn.channel)};
  }
  std::byte* output(const EmulatedTurn&) override { return out_.data(); }
  void finished(const EmulatedTurn&) override {}

 private:
  const Layout layout_;
  EmulatedWorld* world_ = nullptr;
  std::vector<std::byte> x_, scales_, out_;
  std::vector<int32_t> ids_, received_ids_;
  std::vector<float> received_weights_, weights_;
  std::vector<int32_t> tokens_per_expert_;
};

}  // namespace

Counted count_in_a_run(const Shape& shape, uint64_t chunk_bytes, uint64_t seed) {
  EmulatedWorldOptions options;
  options.layout = layout_of(shape);
  for (uint32_t expert = 0; expert < shape.experts; ++expert) {
    options.expert_owner.push_back(static_cast<uint32_t>(uint64_t{expert} * shape.ranks / shape.experts));
  }
  options.chunk_bytes = chunk_bytes;
  options.network = {.profile = emulated_profile("p5en"), .seed = seed};
  options.network.profile.nics = shape.nics;
  EmulatedWorld world(options);
  Idle idle(shape, options.layout, seed);
  idle.use(world);
  world.run(idle, 1);
  Counted counted{.arena_bytes = options.layout.total_bytes()};
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (world.error(rank)) std::rethrow_exception(world.error(rank));
    const ProxyCounters counters = world.proxy(rank)->counters();
    counted.writes += static_cast<double>(counters.writes) / shape.ranks;
    counted.most_writes = std::max(counted.most_writes, counters.writes);
    counted.wire_bytes += static_cast<double>(counters.bytes) / shape.ranks;
    counted.retries += counters.retries;
    counted.fences += world.policy(rank)->counters().fences;
  }
  return counted;
}

}  // namespace efa_ep::wire_counts
