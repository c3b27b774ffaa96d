// Immediates of tile puts: groups of all sources, writes in any order, some immediates changed. A generation
// that was complete stays complete, and nobody signals in this rank's own name.
#include <fuzzer/FuzzedDataProvider.h>

#include <map>
#include <utility>
#include <vector>

#include "arrivals_only.h"
#include "errors.h"
#include "outcomes.h"
#include "protocol/tile_immediate.h"
#include "proxy/tile_puts.h"

using namespace efa_ep;
using fuzzing::require;

namespace {

fuzzing::Outcome refused("refused");
fuzzing::Outcome finished("finished");
constexpr uint32_t kRanks = 5;
constexpr uint32_t kGroups = 3;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzzing::Outcome::count_input();
  FuzzedDataProvider input(data, size);
  fuzzing::ArrivalsOnly fabric;
  std::vector<uint64_t> words(TilePuts::words(kRanks, kGroups));
  TilePuts tiles(fabric, words, {.rank = 0, .ranks = kRanks, .groups = kGroups});
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> complete;  // generations, by source and group
  bool genuine = true;
  try {
    while (input.remaining_bytes() > 0) {
      const auto source = input.ConsumeIntegralInRange<uint32_t>(1, kRanks - 1);
      const auto group = input.ConsumeIntegralInRange<uint32_t>(0, kGroups - 1);
      uint64_t& generation = complete[{source, group}];
      const auto writes = input.ConsumeIntegralInRange<uint32_t>(1, 6);
      const auto last = input.ConsumeIntegralInRange<uint32_t>(0, writes - 1);
      for (uint32_t write = 0; write < writes; ++write) {
        uint32_t immediate = TileImmediate{.source = source,
                                           .generation = static_cast<uint32_t>(generation),
                                           .group = group,
                                           .writes = write == last ? writes : 0}
                                 .encode();
        const auto change = input.ConsumeIntegral<uint8_t>();
        if (change >= 248) {
          genuine = false;
          immediate = change == 255 ? input.ConsumeIntegral<uint32_t>()
                                    : immediate ^ 1U << input.ConsumeIntegralInRange(0, 31);
        }
        fabric.deliver(immediate);
        if (change == 247) fabric.deliver(immediate), genuine = false;
      }
      while (tiles.drive()) {
      }
      if (genuine) {
        ++generation;
        require(tiles.signal(source, group) == generation, "a complete group is signalled");
      }
    }
    ++finished;
  } catch (const ProtocolError&) {
    require(!genuine, "the genuine is not refused");
    ++refused;
  }
  for (const auto& [key, generations] : complete) {
    require(tiles.signal(key.first, key.second) >= generations, "what was complete stays");
  }
  for (uint32_t group = 0; group < kGroups; ++group) {
    require(tiles.signal(0, group) == 0, "nobody signals in this rank's name");
  }
  return 0;
}
