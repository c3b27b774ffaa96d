// How many arrivals can wait in a rank's completion queues. EFA does not protect a completion queue from
// overrunning and is lost when it happens, and no sender can know what a receiver has polled, so the bound
// must follow from the protocol:
//  - a source sends the dispatch of round r + 1 to a rank only after that rank's combine of round r, hence
//    after that rank has polled the source's whole dispatch of round r;
//  - it sends the combine of round r + 1 to a rank only after that rank's dispatch of round r + 1, hence
//    after that rank has polled the source's whole combine of round r.
// So of one source, each channel has at most one dispatch and one combine waiting.
#pragma once

#include <cstdint>

#include "protocol/chunking.h"
#include "protocol/layout.h"

namespace efa_ep {

/// Most arrivals that can wait in the completion queue of one of a rank's `rails` NICs, if rows are cut into
/// chunks of `chunk_bytes`.
constexpr uint64_t most_arrivals(const Layout& layout, uint64_t chunk_bytes, uint32_t rails) {
  uint64_t per_source = 0;
  for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
    const uint64_t row = layout.row_bytes(operation);
    const uint64_t chunks = Chunking::of(layout.max_tokens, row, chunk_bytes, rails).chunks;
    per_source += layout.channels * ((chunks + rails - 1) / rails);
  }
  return (layout.topology.nodes() - 1) * per_source;
}

}  // namespace efa_ep
