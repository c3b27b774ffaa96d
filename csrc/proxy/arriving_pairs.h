// What has arrived of each (channel, operation, source node), told by the immediates alone.
#pragma once

#include <cstdint>
#include <vector>

#include "protocol/immediate.h"
#include "protocol/layout.h"
#include "protocol/round.h"

namespace efa_ep {

class ArrivingPairs {
 public:
  /// One arrived chunk.
  struct Chunk {
    Immediate immediate;
    RoundWord word;       ///< of its pair; the rows are known once `completes_pair`
    bool completes_pair;  ///< all of its pair's round has arrived with this one
  };

  /// For the rank or ranks of `node`; rows are cut as Chunking::of() does with `chunk_bytes` and `rails`.
  ArrivingPairs(const Layout& layout, uint32_t node, uint64_t chunk_bytes, uint32_t rails);

  /// Counts one chunk, given its immediate as it came: chunks of a round in any order, rounds one after
  /// another. Throws ProtocolError for one that no rank of this run sends here now.
  Chunk take(uint32_t bits);

 private:
  struct Pair {
    uint32_t round = 1;
    uint32_t chunks_seen = 0;
    bool rows_known = false;
    uint32_t rows = 0;
    uint32_t chunks = 0;
  };
  Pair& pair_of(const Immediate& immediate);

  const Layout& layout_;
  const uint32_t node_;
  const uint64_t chunk_bytes_;
  const uint32_t rails_;
  std::vector<Pair> pairs_;
};

}  // namespace efa_ep
