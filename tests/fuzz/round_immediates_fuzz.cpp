// Immediates of rounds, as the proxy takes them in: shipments of all pairs in any order, some of their
// immediates changed. What was complete before the first wrong one stays; what is announced later is no more
// than there may be; nothing else in the arena changes.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <map>
#include <vector>

#include "arrivals_only.h"
#include "errors.h"
#include "outcomes.h"
#include "protocol/chunking.h"
#include "protocol/round.h"
#include "proxy/proxy.h"
#include "test_memory.h"

using namespace efa_ep;
using fuzzing::require;

namespace {

fuzzing::Outcome refused("refused");
fuzzing::Outcome finished("finished");

Layout four_nodes() {
  Layout layout;
  layout.topology = {4, 1};
  layout.row = {.top_k = 1, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 48};
  layout.max_tokens = 40;
  layout.channels = 2;
  return layout;
}

/// One pair's immediates of its next round, first chunk first.
std::vector<uint32_t> shipment(Operation operation, uint32_t channel, uint32_t source, RoundWord round,
                               const Chunking& chunking) {
  std::vector<uint32_t> immediates;
  for (uint32_t chunk = 0; chunk < chunking.chunks; ++chunk) {
    immediates.push_back(Immediate{.round_tag = round.round % Immediate::kRoundPeriod,
                                   .operation = operation,
                                   .channel = channel,
                                   .source_node = source,
                                   .first = chunk == 0,
                                   .value = chunk == 0 ? round.rows : chunk}
                             .encode());
  }
  return immediates;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzzing::Outcome::count_input();
  FuzzedDataProvider input(data, size);
  static const Layout layout = four_nodes();
  const TestMemory arena(layout.total_bytes());
  fuzzing::ArrivalsOnly fabric;
  Proxy proxy(fabric, arena.data(), {.layout = layout, .chunk_bytes = 96}, false);
  std::map<size_t, RoundWord> complete;  // by the word's offset
  bool genuine = true;
  while (input.remaining_bytes() > 0) {
    const auto operation = static_cast<Operation>(input.ConsumeIntegralInRange(0, 1));
    const auto channel = input.ConsumeIntegralInRange<uint32_t>(0, layout.channels - 1);
    const auto source = input.ConsumeIntegralInRange<uint32_t>(1, 3);
    const size_t word = layout.arrival(channel, operation, source);
    const RoundWord next{complete[word].round + 1,
                         input.ConsumeIntegralInRange<uint32_t>(0, layout.max_tokens)};
    std::vector<uint32_t> immediates =
        shipment(operation, channel, source, next,
                 Chunking::of(next.rows, layout.row_bytes(operation), proxy.chunk_bytes(), proxy.rails()));
    while (!immediates.empty()) {
      const auto place = input.ConsumeIntegralInRange<size_t>(0, immediates.size() - 1);
      uint32_t immediate = immediates[place];
      immediates.erase(immediates.begin() + static_cast<ptrdiff_t>(place));
      const auto change = input.ConsumeIntegral<uint8_t>();
      if (change >= 248) {
        genuine = false;
        immediate = change == 255 ? input.ConsumeIntegral<uint32_t>()
                                  : immediate ^ 1U << input.ConsumeIntegralInRange(0, 31);
      }
      fabric.deliver(immediate);
      if (change == 247) fabric.deliver(immediate), genuine = false;
    }
    while (proxy.help()) {
    }
    if (genuine) complete[word] = next;
  }
  try {
    proxy.throw_if_failed();
    ++finished;
  } catch (const ProtocolError&) {
    require(!genuine, "the genuine is not refused");
    ++refused;
  }
  for (uint32_t channel = 0; channel < layout.channels; ++channel) {
    for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
      for (uint32_t source = 0; source < layout.topology.nodes(); ++source) {
        uint64_t bits = 0;
        const size_t word = layout.arrival(channel, operation, source);
        std::memcpy(&bits, arena.data() + word, sizeof bits);
        const RoundWord published = RoundWord::decode(bits);
        require(published.round >= complete[word].round, "what was complete stays");
        require(published.rows <= layout.max_tokens, "no more rows than there may be");
        require(published.round != complete[word].round || bits == complete[word].encode(),
                "a complete word does not change");
        std::memset(arena.data() + word, 0, sizeof bits);
      }
    }
  }
  for (size_t at = 0; at < arena.bytes(); ++at) {
    require(arena.data()[at] == std::byte{0}, "arrivals change nothing but their words");
  }
  return 0;
}
