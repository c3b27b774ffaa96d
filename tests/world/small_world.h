// Small worlds for tests that take rounds apart, half by half.
#pragma once

#include <cstdint>
#include <vector>

#include "world.h"

namespace efa_ep {

inline constexpr uint32_t kTopK = 2;
inline constexpr uint32_t kMaxTokens = 4;

/// One expert per rank, and no proxy threads.
WorldConfig small_config(uint32_t nodes, uint32_t ranks_per_node);

/// Runs one half on all the given ranks at the same time.
void run_half(World& world, Half half, const std::vector<uint32_t>& ranks,
              const std::vector<RankRound>& round);
void run_round(World& world, const std::vector<uint32_t>& ranks, const std::vector<RankRound>& round);

std::vector<uint32_t> all_ranks(const WorldConfig& config);

}  // namespace efa_ep
