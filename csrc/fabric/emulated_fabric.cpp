#include "fabric/emulated_fabric.h"

#include <array>
#include <cstring>
#include <string>

#include "errors.h"

namespace efa_ep {
namespace {

constexpr std::array<char, 8> kMagic = {'E', 'F', 'A', 'E', 'P', 'E', 'M', 'U'};

/// The bytes of address(). All ranks live in one process, so there is one byte order.
struct Address {
  std::array<char, 8> magic;
  uint64_t network;
  uint64_t key;
  uint64_t memory_bytes;
  uint64_t endpoint;
};

}  // namespace

EmulatedFabric::EmulatedFabric(EmulatedNetwork& network, uint32_t rank, std::optional<uint32_t> nics_of)
    : network_(network), endpoint_(network.open(rank, nics_of)) {
  const EmulatedProfile& profile = network.profile();
  description_.provider = "emulated";
  description_.fabric = profile.name;
  for (uint32_t nic = 0; nic < profile.nics; ++nic) {
    description_.nics.push_back("emulated" + std::to_string(nic));
  }
  description_.send_queue_depth = profile.send_queue_depth;
  description_.completion_queue_depth = profile.completion_queue_depth;
  description_.max_write_bytes = profile.max_write_bytes;
  description_.honours_fence = profile.honours_fence;
}

EmulatedFabric::~EmulatedFabric() { network_.close(endpoint_); }

void EmulatedFabric::register_memory(std::byte* base, size_t bytes) {
  network_.register_memory(endpoint_, {base, bytes});
}

std::vector<std::byte> EmulatedFabric::address() const {
  const EmulatedEndpoint& endpoint = network_.endpoint(endpoint_);
  const Address address{kMagic, network_.id(), endpoint.key, endpoint.memory.size(), endpoint_};
  std::vector<std::byte> bytes(sizeof address);
  std::memcpy(bytes.data(), &address, sizeof address);
  return bytes;
}

void EmulatedFabric::connect(uint32_t peer, std::span<const std::byte> address) {
  Address decoded{};
  const std::string whose = "the address of rank " + std::to_string(peer);
  if (address.size() != sizeof decoded) {
    throw ProtocolError(whose + " has " + std::to_string(address.size()) +
                        " bytes, that of an emulated fabric " + std::to_string(sizeof decoded) +
                        "; use the same network on all ranks");
  }
  std::memcpy(&decoded, address.data(), sizeof decoded);
  if (decoded.magic != kMagic || decoded.network != network_.id()) {
    throw ProtocolError(whose + " is not of this emulated network; use the same network on all ranks");
  }
  if (decoded.endpoint >= UINT32_MAX || !network_.has_endpoint(static_cast<uint32_t>(decoded.endpoint))) {
    throw ProtocolError(whose + " names endpoint " + std::to_string(decoded.endpoint) +
                        ", which does not exist");
  }
  network_.connect(endpoint_, peer,
                   {static_cast<uint32_t>(decoded.endpoint), decoded.key, decoded.memory_bytes});
}

PostResult EmulatedFabric::post_write(const WriteRequest& request) {
  return network_.post(endpoint_, request);
}

size_t EmulatedFabric::poll(std::span<Completion> completions) {
  return network_.poll(endpoint_, completions);
}

}  // namespace efa_ep
