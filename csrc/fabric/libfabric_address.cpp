#include "fabric/libfabric_address.h"

#include <cstring>
#include <limits>

#include "errors.h"

namespace efa_ep {
namespace {

constexpr uint32_t kMagic = 0x50454645;  // "EFEP"
constexpr uint32_t kFormat = 1;

// Lengths a sane address stays below; they bound what a foreign address can make this rank allocate.
constexpr uint32_t kMaxNameBytes = 256;
constexpr uint32_t kMaxRails = 256;
constexpr uint64_t kMaxMemoryBytes = uint64_t{1} << 47;

class Writer {
 public:
  template <typename Integer>
  void integer(Integer value) {
    append(&value, sizeof value);
  }
  template <typename Container>
  void text(const Container& content) {
    integer(static_cast<uint32_t>(content.size()));
    append(content.data(), content.size());
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  void append(const void* data, size_t size) {
    const auto* first = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), first, first + size);
  }
  std::vector<std::byte> bytes_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes), total_(bytes.size()) {}

  template <typename Integer>
  Integer integer(const char* what) {
    Integer value;
    std::memcpy(&value, take(sizeof value, what).data(), sizeof value);
    return value;
  }
  template <typename Container>
  Container text(const char* what) {
    const auto length = integer<uint32_t>(what);
    limit(length, kMaxNameBytes, what);
    const std::span<const std::byte> content = take(length, what);
    Container result(length, typename Container::value_type{});
    if (length > 0) std::memcpy(result.data(), content.data(), length);
    return result;
  }
  void limit(uint64_t value, uint64_t most, const char* what) const {
    if (value > most)
      fail(std::string(what) + " is " + std::to_string(value) + ", at most " + std::to_string(most));
  }
  void end() const {
    if (!rest_.empty()) fail(std::to_string(rest_.size()) + " bytes too long");
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw ProtocolError("not a fabric address of this version of vllm-efa-ep (" + std::to_string(total_) +
                        " bytes): " + why + ". Run the same version on every rank.");
  }

 private:
  std::span<const std::byte> take(size_t size, const char* what) {
    if (rest_.size() < size) fail(std::string("truncated in its ") + what);
    const std::span<const std::byte> taken = rest_.first(size);
    rest_ = rest_.subspan(size);
    return taken;
  }
  std::span<const std::byte> rest_;
  size_t total_;
};

}  // namespace

std::vector<std::byte> FabricAddress::encode() const {
  Writer writer;
  writer.integer(kMagic);
  writer.integer(kFormat);
  writer.integer(library_major);
  writer.integer(library_minor);
  writer.text(provider);
  writer.text(fabric);
  writer.integer(address_format);
  writer.integer(memory_bytes);
  writer.integer(static_cast<uint32_t>(rails.size()));
  for (const RailAddress& rail : rails) {
    writer.text(rail.endpoint_name);
    writer.integer(rail.base);
    for (const uint64_t key : rail.keys) writer.integer(key);
  }
  return writer.take();
}

FabricAddress FabricAddress::decode(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  if (reader.integer<uint32_t>("magic number") != kMagic) reader.fail("wrong magic number");
  if (const auto format = reader.integer<uint32_t>("format"); format != kFormat) {
    reader.fail("format " + std::to_string(format) + " instead of " + std::to_string(kFormat));
  }
  FabricAddress address;
  address.library_major = reader.integer<uint32_t>("libfabric version");
  address.library_minor = reader.integer<uint32_t>("libfabric version");
  address.provider = reader.text<std::string>("provider name");
  address.fabric = reader.text<std::string>("fabric name");
  address.address_format = reader.integer<uint32_t>("address format");
  address.memory_bytes = reader.integer<uint64_t>("memory size");
  reader.limit(address.memory_bytes, kMaxMemoryBytes, "memory size");
  const auto rails = reader.integer<uint32_t>("rail count");
  reader.limit(rails, kMaxRails, "rail count");
  for (uint32_t i = 0; i < rails; ++i) {
    RailAddress& rail = address.rails.emplace_back();
    rail.endpoint_name = reader.text<std::vector<std::byte>>("endpoint name");
    rail.base = reader.integer<uint64_t>("base address");
    reader.limit(rail.base, std::numeric_limits<uint64_t>::max() - address.memory_bytes, "base address");
    for (uint64_t piece = 0; piece < piece_count(address.memory_bytes); ++piece) {
      rail.keys.push_back(reader.integer<uint64_t>("memory key"));
    }
  }
  reader.end();
  return address;
}

void FabricAddress::require_compatible(uint32_t peer_rank, const FabricAddress& peer) const {
  const auto require_equal = [&](const std::string& what, const std::string& mine, const std::string& theirs,
                                 const std::string& remedy) {
    if (mine == theirs) return;
    throw ProtocolError("rank " + std::to_string(peer_rank) + " has " + what + " " + theirs +
                        ", this rank has " + mine + ". " + remedy);
  };
  const auto quoted = [](const std::string& name) { return "\"" + name + "\""; };
  const auto version = [](const FabricAddress& address) {
    return std::to_string(address.library_major) + "." + std::to_string(address.library_minor);
  };
  require_equal("libfabric", version(*this), version(peer), "Install one version on every host.");
  require_equal("provider", quoted(provider), quoted(peer.provider),
                "Set EFA_EP_PROVIDER alike on every host.");
  require_equal("fabric", quoted(fabric), quoted(peer.fabric), "Set EFA_EP_PROVIDER alike on every host.");
  require_equal("address format", std::to_string(address_format), std::to_string(peer.address_format),
                "Choose interfaces of one address family (EFA_EP_INTERFACE).");
  require_equal("number of NICs", std::to_string(rails.size()), std::to_string(peer.rails.size()),
                "Set EFA_EP_NICS_PER_RANK alike on every rank.");
  for (size_t i = 0; i < rails.size(); ++i) {
    require_equal("length of endpoint name", std::to_string(rails[i].endpoint_name.size()),
                  std::to_string(peer.rails[i].endpoint_name.size()),
                  "Choose interfaces of one address family (EFA_EP_INTERFACE).");
  }
}

}  // namespace efa_ep
