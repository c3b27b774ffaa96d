#include "fabric/libfabric_fabric.h"

#include "errors.h"
#include "protocol/limits.h"

namespace efa_ep {

LibfabricFabric::LibfabricFabric(const LibfabricOptions& options) {
  const LibfabricLibrary& library = LibfabricLibrary::open(options.library);
  ProviderChoice choice = choose_provider(library, options);
  for (InfoPtr& nic : choice.nics) {
    const auto index = static_cast<uint32_t>(rails_.size());
    rails_.push_back(std::make_unique<LibfabricRail>(std::move(nic), index, options.peers));
  }

  const LibfabricRail& rail = *rails_.front();
  description_.library =
      library.path() + " " + library.version() + (choice.note.empty() ? "" : ", " + choice.note);
  description_.provider = choice.provider;
  description_.fabric = choice.fabric;
  for (const auto& each : rails_) description_.nics.emplace_back(each->nic());
  description_.send_queue_depth = rail.send_queue_depth();
  description_.completion_queue_depth = rail.completion_queue_depth();
  description_.max_write_bytes = rail.max_write_bytes();
  description_.honours_fence = rail.honours_fence();

  identity_.library_major = library.major();
  identity_.library_minor = library.minor();
  identity_.provider = choice.provider;
  if (choice.fabric_matters) identity_.fabric = choice.fabric;
  identity_.address_format = rail.address_format();
}

void LibfabricFabric::require_unregistered(size_t bytes) const {
  if (identity_.memory_bytes != 0)
    throw ConfigurationError("register_memory() was called before; a rank has one arena");
  if (bytes == 0) throw ConfigurationError("register_memory() needs at least one byte");
}

void LibfabricFabric::register_device_memory(const DeviceRange& range) {
  require_unregistered(range.bytes);
  for (const auto& rail : rails_) rail->register_device_memory(range);
  identity_.memory_bytes = range.bytes;
}

void LibfabricFabric::register_memory(std::byte* base, size_t bytes) {
  require_unregistered(bytes);
  for (const auto& rail : rails_) rail->register_memory(base, bytes);
  identity_.memory_bytes = bytes;
}

FabricAddress LibfabricFabric::own_address() const {
  if (identity_.memory_bytes == 0)
    throw ConfigurationError("register_memory() must come before address() and connect()");
  FabricAddress address = identity_;
  for (const auto& rail : rails_) address.rails.push_back(rail->address());
  return address;
}

std::vector<std::byte> LibfabricFabric::address() const { return own_address().encode(); }

void LibfabricFabric::connect(uint32_t peer, std::span<const std::byte> address) {
  if (peer >= kMaxRanks) {
    throw ConfigurationError("rank " + std::to_string(peer) + " is out of range; a world has at most " +
                             std::to_string(kMaxRanks) + " ranks");
  }
  if (connected_.size() <= peer) connected_.resize(peer + 1);
  if (connected_[peer]) throw ConfigurationError("rank " + std::to_string(peer) + " is connected already");
  const FabricAddress theirs = FabricAddress::decode(address);
  own_address().require_compatible(peer, theirs);
  for (size_t i = 0; i < rails_.size(); ++i) rails_[i]->connect(peer, theirs.rails[i], theirs.memory_bytes);
  connected_[peer] = true;
}

PostResult LibfabricFabric::post_write(const WriteRequest& request) {
  if (request.rail >= rails_.size()) {
    throw ConfigurationError("rail " + std::to_string(request.rail) + " does not exist; this rank has " +
                             std::to_string(rails_.size()));
  }
  return rails_[request.rail]->post_write(request);
}

size_t LibfabricFabric::poll(std::span<Completion> completions) {
  // Reading a rail makes its progress. A different one comes first each time, so that a busy rail cannot take
  // all the room for ever.
  first_polled_ = (first_polled_ + 1) % rails_.size();
  size_t filled = 0;
  for (size_t i = 0; i < rails_.size(); ++i) {
    filled += rails_[(first_polled_ + i) % rails_.size()]->poll(completions.subspan(filled));
  }
  return filled;
}

}  // namespace efa_ep
