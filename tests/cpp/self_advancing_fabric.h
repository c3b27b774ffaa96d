// An emulated fabric for tests that know no virtual time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "fabric/emulated_fabric.h"

namespace efa_ep {

/// The suite polls until something comes and knows no virtual time, so an empty poll lets time go on.
class SelfAdvancingFabric final : public Fabric {
 public:
  SelfAdvancingFabric(EmulatedNetwork& network, uint32_t rank) : network_(network), fabric_(network, rank) {}
  const FabricDescription& description() const override { return fabric_.description(); }
  void register_memory(std::byte* base, size_t bytes) override { fabric_.register_memory(base, bytes); }
  std::vector<std::byte> address() const override { return fabric_.address(); }
  void connect(uint32_t peer, std::span<const std::byte> address) override { fabric_.connect(peer, address); }
  PostResult post_write(const WriteRequest& request) override { return fabric_.post_write(request); }
  size_t poll(std::span<Completion> completions) override {
    const size_t count = fabric_.poll(completions);
    if (count == 0) network_.advance();
    return count;
  }

 private:
  EmulatedNetwork& network_;
  EmulatedFabric fabric_;
};

}  // namespace efa_ep
