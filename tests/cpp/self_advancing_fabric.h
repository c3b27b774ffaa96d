// An emulated fabric for tests that know no virtual time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "fabric/emulated_fabric.h"
#include "forwarding_fabric.h"

namespace efa_ep {

struct OwnedEmulatedFabric {
  EmulatedFabric emulated;
};

/// The suite polls until something comes and knows no virtual time, so an empty poll lets time go on.
class SelfAdvancingFabric final : OwnedEmulatedFabric, public ForwardingFabric {
 public:
  SelfAdvancingFabric(EmulatedNetwork& network, uint32_t rank)
      : OwnedEmulatedFabric{{network, rank}}, ForwardingFabric(emulated), network_(network) {}
  size_t poll(std::span<Completion> completions) override {
    const size_t count = fabric_.poll(completions);
    if (count == 0) network_.advance();
    return count;
  }

 private:
  EmulatedNetwork& network_;
};

}  // namespace efa_ep
