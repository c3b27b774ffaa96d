// Addresses of emulated fabrics with a few changes: refused, or every write to them ends in a completion.
#include <fuzzer/FuzzedDataProvider.h>

#include "edited.h"
#include "errors.h"
#include "fabric/emulated_fabric.h"
#include "outcomes.h"

using namespace efa_ep;
using fuzzing::require;

namespace {

fuzzing::Outcome refused("refused");
fuzzing::Outcome failed("failed");
fuzzing::Outcome done("done");

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzzing::Outcome::count_input();
  FuzzedDataProvider input(data, size);
  EmulatedNetwork network(
      {.profile = emulated_profile("hostile"), .seed = input.ConsumeIntegral<uint32_t>()});
  std::vector<std::byte> source(256);
  std::vector<std::byte> target(256);
  EmulatedFabric from(network, 0);
  EmulatedFabric to(network, 1);
  from.register_memory(source.data(), source.size());
  to.register_memory(target.data(), target.size());
  to.connect(0, from.address());
  const std::vector<std::byte> address = fuzzing::edited(to.address(), input);
  try {
    from.connect(1, address);
    const WriteRequest request{.peer = 1,
                               .remote_offset = input.ConsumeIntegralInRange<uint64_t>(0, 511),
                               .bytes = input.ConsumeIntegralInRange<uint32_t>(0, 256)};
    if (from.post_write(request) == PostResult::kAgain) return 0;
  } catch (const ProtocolError&) {
    ++refused;
    return 0;
  } catch (const ConfigurationError&) {  // the write leaves the memory that the address speaks of
    ++refused;
    return 0;
  }
  while (network.advance()) {
  }
  Completion completion;
  require(from.poll({&completion, 1}) == 1, "every write ends in a completion");
  if (completion.kind == CompletionKind::kError) {
    ++failed;
  } else {
    ++done;
  }
  return 0;
}
