// The real network: libfabric with EFA, or with TCP where there is no EFA. One rail per NIC.
#pragma once

#include <memory>
#include <vector>

#include "fabric/fabric.h"
#include "fabric/libfabric_address.h"
#include "fabric/libfabric_provider.h"
#include "fabric/libfabric_rail.h"

namespace efa_ep {

/// The registered memory must outlive the fabric.
class LibfabricFabric final : public Fabric {
 public:
  /// Opens libfabric, chooses provider and NICs and opens an endpoint on each.
  /// Throws FabricUnavailableError or ConfigurationError naming what was tried and what to do.
  explicit LibfabricFabric(const LibfabricOptions& options);

  const FabricDescription& description() const override { return description_; }
  void register_memory(std::byte* base, size_t bytes) override;
  void register_device_memory(const DeviceRange& range) override;
  std::vector<std::byte> address() const override;
  void connect(uint32_t peer, std::span<const std::byte> address) override;
  PostResult post_write(const WriteRequest& request) override;
  size_t poll(std::span<Completion> completions) override;

 private:
  FabricAddress own_address() const;
  void require_unregistered(size_t bytes) const;

  FabricDescription description_;
  FabricAddress identity_;  // what does not depend on the registered memory
  std::vector<std::unique_ptr<LibfabricRail>> rails_;
  std::vector<bool> connected_;  // by rank
  size_t first_polled_ = 0;
};

}  // namespace efa_ep
