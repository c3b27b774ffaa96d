// Prints what a rank and layer cost on the wire, next to the row-per-expert protocols by their formulas.
#include "testing/wire_counts.h"

#include <cstdio>
#include <string>

int main() {
  using namespace efa_ep::wire_counts;
  const Shape shape;
  std::printf(
      "Per rank and layer, counted and not measured: %u tokens, top %u of %u experts, hidden %u, %u ranks "
      "per "
      "node,\nuniform routing, fp8 out and bfloat16 back. Work requests: expected rows to uneven routing.\n",
      shape.tokens, shape.top_k, shape.experts, shape.hidden, shape.ranks_per_node);
  std::printf("%5s %4s  %-33s %13s %6s %8s %8s %11s\n", "ranks", "NICs", "protocol", "work requests",
              "fences", "barriers", "MB sent", "buffers MiB");
  for (const uint32_t ranks : {16u, 32u, 64u, 128u}) {
    for (const uint32_t nics : {1u, 2u, 4u}) {
      for (const Counts& counts : all({.ranks = ranks, .nics = nics})) {
        std::string requests = std::to_string(counts.work_requests);
        if (counts.most_work_requests != counts.work_requests) {
          requests += " to " + std::to_string(counts.most_work_requests);
        }
        const std::string buffers =
            counts.buffer_bytes == 0 ? "-" : std::to_string(counts.buffer_bytes >> 20);
        std::printf("%5u %4u  %-33s %13s %6lu %8lu %8.2f %11s\n", ranks, nics, counts.protocol.c_str(),
                    requests.c_str(), counts.fences, counts.barriers, counts.wire_bytes * 1e-6,
                    buffers.c_str());
      }
    }
  }
  return 0;
}
