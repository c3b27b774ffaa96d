// One rank's end of an emulated network.
#pragma once

#include <optional>

#include "fabric/emulated_network.h"
#include "fabric/fabric.h"

namespace efa_ep {

/// The incarnation of a rank that was made last is the one that faults meet. Neither post_write() nor poll()
/// lets time go on. Destruction is the end of the rank's process.
class EmulatedFabric final : public Fabric {
 public:
  /// On NICs of its own, or on those of the rank `nics_of`, whose links and work requests it then shares.
  EmulatedFabric(EmulatedNetwork& network, uint32_t rank, std::optional<uint32_t> nics_of = std::nullopt);
  ~EmulatedFabric() override;

  const FabricDescription& description() const override { return description_; }
  /// Registering again ends the earlier registration: writes to its key fail from now on.
  void register_memory(std::byte* base, size_t bytes) override;
  std::vector<std::byte> address() const override;
  /// Connecting again replaces the peer's earlier incarnation, whose writes are refused from now on.
  void connect(uint32_t peer, std::span<const std::byte> address) override;
  PostResult post_write(const WriteRequest& request) override;
  size_t poll(std::span<Completion> completions) override;

 private:
  EmulatedNetwork& network_;
  const uint32_t endpoint_;
  FabricDescription description_;
};

}  // namespace efa_ep
