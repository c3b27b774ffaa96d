// The numbers of wire_counts.h that are this project's own, counted in a run.
#pragma once

#include "testing/wire_counts.h"

namespace efa_ep::wire_counts {

/// What a rank of an emulated world of this shape really did in a round, on average.
struct Counted {
  double writes = 0;
  uint64_t most_writes = 0;  ///< of the rank that had the most
  double wire_bytes = 0;
  uint64_t fences = 0;  ///< of all ranks
  uint64_t retries = 0;
  uint64_t arena_bytes = 0;
};

/// Runs one round with tokens routed evenly at random. A world of 64 ranks as in the default shape touches
/// 3 GB. Throws what a rank ended in, if one failed.
Counted count_in_a_run(const Shape& shape, uint64_t chunk_bytes, uint64_t seed);

}  // namespace efa_ep::wire_counts
