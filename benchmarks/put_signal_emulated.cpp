#include <algorithm>
#include <chrono>

#include "errors.h"
#include "fabric/emulated_fabric.h"
#include "put_signal.h"

namespace efa_ep::put_signal {
namespace {

constexpr uint32_t kRuns = 3;

struct World {
  World(const EmulatedProfile& profile, const Cell& cell) : network({.profile = profile}) {
    for (uint32_t rank = 0; rank < cell.ranks; ++rank) {
      memory.emplace_back(memory_bytes(cell.bytes));
      fabrics.push_back(std::make_unique<EmulatedFabric>(network, rank));
      fabrics[rank]->register_memory(memory[rank].data(), memory[rank].size());
    }
    for (const auto& fabric : fabrics) {
      for (uint32_t peer = 0; peer < cell.ranks; ++peer) fabric->connect(peer, fabrics[peer]->address());
    }
  }

  EmulatedNetwork network;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::unique_ptr<EmulatedFabric>> fabrics;
};

/// Lets all ranks do one run, and returns how long it took.
std::chrono::nanoseconds run(EmulatedNetwork& network, std::vector<std::unique_ptr<Rank>>& ranks) {
  const auto started = network.now();
  for (const auto& rank : ranks) rank->begin();
  while (true) {
    bool moved = false;
    for (const auto& rank : ranks) {
      while (rank->step()) moved = true;
    }
    if (moved) continue;
    if (std::ranges::all_of(ranks, [](const auto& rank) { return rank->finished(); })) break;
    if (!network.advance()) throw ProtocolError("the emulated network came to rest before its ranks");
  }
  return network.now() - started;
}

Result measure(World& world, const Cell& cell, Method method) {
  std::vector<std::unique_ptr<Rank>> ranks;
  for (uint32_t rank = 0; rank < cell.ranks; ++rank) {
    ranks.push_back(std::make_unique<Rank>(*world.fabrics[rank], method, cell, rank, world.network.clock()));
  }
  std::chrono::nanoseconds total{0};
  for (uint32_t i = 0; i < kRuns; ++i) total += run(world.network, ranks);
  return {.seconds = std::chrono::duration<double>(total).count() / kRuns,
          .runs = kRuns,
          .fences = ranks[0]->counters().fences / kRuns};
}

}  // namespace

std::vector<Result> measure_emulated(const char* profile, bool honours_fence, const Cell& cell,
                                     std::span<const Method> methods) {
  EmulatedProfile changed = emulated_profile(profile);
  changed.honours_fence = honours_fence;
  World world(changed, cell);
  std::vector<Result> results;
  for (const Method method : methods) {
    Result& result = results.emplace_back(measure(world, cell, method));
    result.share = results.front().seconds / result.seconds;
  }
  return results;
}

}  // namespace efa_ep::put_signal
