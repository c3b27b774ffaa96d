// Prints what a rank and layer cost on the wire, next to the row-per-expert protocols by their formulas; and
// next to what this project's proxies counted in runs.
#include "testing/wire_counts.h"

#include <cstdio>
#include <string>
#include <utility>

#include "testing/wire_counts_run.h"

using namespace efa_ep::wire_counts;

namespace {

// Worlds of up to 64 ranks: one of 128 would touch 6 GB.
void print_runs() {
  std::printf(
      "\nThe same as counted by the proxies of emulated worlds in one round, mean of all ranks, and the\n"
      "rank with the most:\n");
  std::printf("%5s %4s  %-16s %13s %5s %10s %6s %8s %10s %11s\n", "ranks", "NICs", "chunks", "work requests",
              "most", "by formula", "fences", "MB sent", "by formula", "buffers MiB");
  for (const uint32_t ranks : {16u, 32u, 64u}) {
    for (const auto& [name, chunk_bytes] :
         {std::pair{"a chunk per NIC", uint64_t{1} << 30}, std::pair{"256 KB", uint64_t{256} << 10},
          std::pair{"128 KB", uint64_t{128} << 10}}) {
      const Shape shape{.ranks = ranks};
      const Counts formula = ours(shape, name, chunk_bytes);
      const Counted run = count_in_a_run(shape, chunk_bytes, 1);
      std::printf("%5u %4u  %-16s %13.2f %5lu %10lu %6lu %8.2f %10.2f %11lu\n", ranks, shape.nics, name,
                  run.writes, run.most_writes, formula.work_requests, run.fences, run.wire_bytes * 1e-6,
                  formula.wire_bytes * 1e-6, run.arena_bytes >> 20);
    }
  }
}

}  // namespace

int main() {
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
  print_runs();
  return 0;
}
