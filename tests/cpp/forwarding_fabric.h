// What fabrics of tests that change one thing about another fabric have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "fabric/fabric.h"

namespace efa_ep {

/// Hands everything to another fabric, which outlives it.
class ForwardingFabric : public Fabric {
 public:
  explicit ForwardingFabric(Fabric& fabric) : fabric_(fabric) {}
  const FabricDescription& description() const override { return fabric_.description(); }
  void register_memory(std::byte* base, size_t bytes) override { fabric_.register_memory(base, bytes); }
  std::vector<std::byte> address() const override { return fabric_.address(); }
  void connect(uint32_t peer, std::span<const std::byte> address) override { fabric_.connect(peer, address); }
  PostResult post_write(const WriteRequest& request) override { return fabric_.post_write(request); }
  size_t poll(std::span<Completion> completions) override { return fabric_.poll(completions); }

 protected:
  Fabric& fabric_;
};

}  // namespace efa_ep
