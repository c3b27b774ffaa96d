// One device among peers that the input plays: flags, row lists, rows and places of results are what the
// protocol asks for, but for some that are anything. In some halves the peers also change everything they
// share with the device while it reads. A round ends well, in ProtocolError, or in RankTimeoutError.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "changing_memory.h"
#include "cpu/device.h"
#include "errors.h"
#include "fabric/null_fabric.h"
#include "outcomes.h"
#include "protocol/round.h"
#include "test_memory.h"

using namespace efa_ep;
using fuzzing::ChangingMemory;
using fuzzing::require;

namespace {

fuzzing::Outcome refused("refused");
fuzzing::Outcome timed_out("timed out");
fuzzing::Outcome finished("finished");

class Scene {
 public:
  explicit Scene(FuzzedDataProvider& input) : input_(input) {
    const uint32_t ranks_per_node = 1 + below(3);
    layout_.topology = {(1 + below(3)) * ranks_per_node, ranks_per_node};
    layout_.row = {.top_k = 3, .payload_bytes = 16, .scale_bytes = below(2) * 4, .combine_bytes = 32};
    layout_.max_tokens = 1 + below(4);
    rank_ = below(layout_.topology.world);
    node_ = layout_.topology.node_of(rank_);
    index_ = layout_.topology.index_of(rank_);
    experts_ = 2 * layout_.topology.world;
    per_expert_ = input.ConsumeBool();
    std::vector<std::byte*> pointers;
    for (uint32_t i = 0; i < ranks_per_node; ++i) {
      pointers.push_back(arenas_.emplace_back(layout_.total_bytes()).data());
    }
    if (layout_.topology.nodes() > 1) {
      proxy_ = std::make_unique<Proxy>(
          fabric_, own(), ProxyOptions{.layout = layout_, .rank = rank_, .chunk_bytes = 64}, false);
    }
    CpuDeviceOptions options;
    options.layout = layout_;
    options.rank = rank_;
    for (uint32_t expert = 0; expert < experts_; ++expert) options.expert_owner.push_back(owner_of(expert));
    options.per_expert = per_expert_;
    options.timeout = std::chrono::nanoseconds::zero();
    device_ = std::make_unique<CpuDevice>(options, pointers, proxy_.get());
  }

  void play_round() {
    ++round_;
    dispatch_send();
    play_dispatch_of_peers();
    const uint32_t rows = dispatch_recv();
    play_results_of_peers();
    combine(rows);
  }

 private:
  // Choices. One that runs out of input is zero, which is always a usual one.
  uint32_t below(uint32_t bound) { return input_.ConsumeIntegralInRange<uint32_t>(0, bound - 1); }
  bool rarely() { return input_.ConsumeIntegral<uint8_t>() >= 248; }
  uint32_t id() { return below(experts_ + 1) - 1; }
  uint32_t owner_of(uint32_t expert) const { return expert % layout_.topology.world; }
  bool is_on(const int32_t* ids, uint32_t rank) const {
    return std::any_of(ids, ids + layout_.row.top_k, [&](int32_t each) {
      return each >= 0 && owner_of(static_cast<uint32_t>(each)) == rank;
    });
  }

  std::byte* own() const { return arenas_[index_].data(); }
  template <class T>
  T* at(uint32_t index, size_t offset) const {
    return reinterpret_cast<T*>(arenas_[index].data() + offset);
  }
  void publish(size_t offset, uint32_t rows) {
    RoundWord word{round_, rows};
    if (rarely()) word = {input_.ConsumeBool() ? round_ : round_ + 1, input_.ConsumeIntegral<uint32_t>()};
    *at<uint64_t>(index_, offset) = word.encode();
  }

  void dispatch_send() {
    tokens_ = below(layout_.max_tokens + 1);
    const RowShape& row = layout_.row;
    ids_.resize(size_t{tokens_} * row.top_k);
    for (int32_t& each : ids_) each = static_cast<int32_t>(id());
    const std::vector<float> weights(ids_.size(), 1.0f);
    const Bytes x(size_t{tokens_} * row.payload_bytes);
    const Bytes scales(size_t{tokens_} * row.scale_bytes);
    const bool in_place = input_.ConsumeBool();
    const auto changing = maybe_changing();
    device_->dispatch_send(0, {.x = in_place ? device_->activations(0) : x.data(),
                               .x_stride = in_place ? layout_.dispatch_row() : row.payload_bytes,
                               .scales = scales.data(),
                               .ids = ids_.data(),
                               .weights = weights.data(),
                               .tokens = tokens_});
  }

  // What the local peers list for this rank, and what arrived from the other nodes on this rank's rail.
  void play_dispatch_of_peers() {
    const Topology& topology = layout_.topology;
    for (uint32_t node = 0; node < topology.nodes(); ++node) {
      for (uint32_t local = 0; local < topology.ranks_per_node; ++local) {
        const bool own_rail = local == index_;
        if (own_rail && node == node_) continue;
        const uint32_t rows = below(layout_.max_tokens + 1);
        const size_t section = node == node_ ? layout_.outgoing(0, Operation::kDispatch)
                                             : layout_.slot(0, Operation::kDispatch, node_, node);
        auto* list = at<uint32_t>(local, layout_.row_list(0, node, index_));
        for (uint32_t row = 0; row < rows; ++row) {
          if (!own_rail) list[row] = rarely() ? input_.ConsumeIntegral<uint32_t>() : row;
          auto* ids = at<uint32_t>(local, section + row * layout_.dispatch_row() + RowShape::ids_offset());
          for (uint32_t slot = 0; slot < layout_.row.top_k; ++slot) {
            ids[slot] = rarely() ? input_.ConsumeIntegral<uint32_t>() : id();
          }
        }
        publish(own_rail ? layout_.arrival(0, Operation::kDispatch, node)
                         : layout_.dispatch_flag(0, layout_.block(index_, node, local)),
                rows);
      }
    }
  }

  uint32_t dispatch_recv() {
    const auto changing = maybe_changing();
    const uint32_t rows = device_->dispatch_wait(0);
    require(rows <= device_->capacity(), "no more rows than the output has room for");
    const size_t places = per_expert_ ? size_t{device_->local_experts()} * device_->capacity() : rows;
    Bytes x(places * layout_.row.payload_bytes);
    Bytes scales(places * layout_.row.scale_bytes);
    std::vector<int32_t> ids(size_t{rows} * layout_.row.top_k);
    std::vector<float> weights(ids.size());
    std::vector<int32_t> counts(device_->local_experts());
    device_->dispatch_pack(0, {.x = x.data(),
                               .scales = scales.data(),
                               .ids = ids.data(),
                               .weights = weights.data(),
                               .tokens_per_expert = counts.data()});
    for (const int32_t count : counts) {
      require(count >= 0 && static_cast<uint32_t>(count) <= device_->capacity() * layout_.row.top_k,
              "counts fit their experts");
    }
    if (!per_expert_) check_counts(ids, counts);
    return rows;
  }

  // Whoever uses the ids that were handed out must find them in the counts, even if peers changed them since.
  void check_counts(const std::vector<int32_t>& ids, const std::vector<int32_t>& counts) const {
    std::vector<int32_t> found(counts.size());
    for (const int32_t each : ids) {
      if (each < 0 || owner_of(static_cast<uint32_t>(each)) != rank_) continue;
      ++found.at(static_cast<uint32_t>(each) / layout_.topology.world);
    }
    require(found == counts, "counts are those of the ids handed out");
  }

  // Every owner of the node has results for what was listed for it, and the other nodes their sums.
  void play_results_of_peers() {
    const Topology& topology = layout_.topology;
    for (uint32_t node = 0; node < topology.nodes(); ++node) {
      for (uint32_t owner = 0; owner < topology.ranks_per_node; ++owner) {
        if (owner == index_) continue;
        const uint64_t listed =
            *at<uint64_t>(owner, layout_.dispatch_flag(0, layout_.block(owner, node, index_)));
        const size_t flag = layout_.result_flag(0, layout_.block(index_, node, owner));
        *at<uint64_t>(index_, flag + sizeof(uint64_t)) =
            rarely() ? input_.ConsumeIntegral<uint64_t>() : below(2);
        publish(flag, RoundWord::decode(listed).rows);
      }
      if (node == node_) continue;
      uint32_t sums = 0;
      for (uint32_t token = 0; token < tokens_; ++token) {
        const int32_t* ids = ids_.data() + size_t{token} * layout_.row.top_k;
        bool goes_there = false;
        for (uint32_t local = 0; local < topology.ranks_per_node; ++local) {
          goes_there |= is_on(ids, topology.rank_at(node, local));
        }
        sums += goes_there ? 1 : 0;
      }
      publish(layout_.arrival(0, Operation::kCombine, node), sums);
    }
  }

  void combine(uint32_t rows) {
    const size_t places = per_expert_ ? size_t{device_->local_experts()} * device_->capacity()
                                      : size_t{rows} * layout_.row.top_k;
    const Bytes results(places * layout_.row.combine_bytes);
    Bytes out(size_t{tokens_} * layout_.row.combine_bytes);
    const bool in_place = !per_expert_ && input_.ConsumeBool();
    const auto changing = maybe_changing();
    device_->combine_send(0, {.rows = in_place ? device_->results(0) : results.data(),
                              .per_slot = !per_expert_ && !in_place,
                              .weights_applied = input_.ConsumeBool()});
    device_->combine_recv(0, out.data());
  }

  // Peers that change a word near each place that the device touches, now and then.
  std::unique_ptr<ChangingMemory> maybe_changing() {
    if (input_.ConsumeIntegral<uint8_t>() < 224) return nullptr;
    std::vector<std::span<std::byte>> memory;
    for (const TestMemory& arena : arenas_) memory.emplace_back(arena.data(), arena.bytes());
    const uint8_t rate = input_.ConsumeIntegralInRange<uint8_t>(1, 32);
    return std::make_unique<ChangingMemory>(memory, [this, rate, state = input_.ConsumeIntegral<uint32_t>()](
                                                        std::byte* touched) mutable {
      state = state * 1'664'525 + 1'013'904'223;  // input would run out
      const uint32_t random = state >> 8;
      if (random % 32 >= rate) return;
      auto* word = reinterpret_cast<uint32_t*>(reinterpret_cast<uintptr_t>(touched) & ~uintptr_t{3});
      const uint32_t values[] = {(random >> 8) % (experts_ + 1) - 1, random, *word + 1, layout_.max_tokens};
      *word = values[random >> 5 & 3];
    });
  }

  FuzzedDataProvider& input_;
  Layout layout_;
  uint32_t rank_ = 0;
  uint32_t node_ = 0;
  uint32_t index_ = 0;
  uint32_t experts_ = 0;
  bool per_expert_ = false;
  NullFabric fabric_{1, 1024};
  std::vector<TestMemory> arenas_;
  std::unique_ptr<Proxy> proxy_;
  std::unique_ptr<CpuDevice> device_;
  uint32_t round_ = 0;
  uint32_t tokens_ = 0;
  std::vector<int32_t> ids_;  // of the own tokens
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzzing::Outcome::count_input();
  FuzzedDataProvider input(data, size);
  Scene scene(input);
  try {
    for (auto rounds = input.ConsumeIntegralInRange(1, 3); rounds > 0; --rounds) scene.play_round();
    ++finished;
  } catch (const ProtocolError&) {
    ++refused;
  } catch (const RankTimeoutError&) {
    ++timed_out;
  }
  return 0;
}
