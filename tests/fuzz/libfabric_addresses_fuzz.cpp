// Addresses of LibfabricFabric: arbitrary bytes, and genuine addresses with a few changes. They are decoded
// to what encodes to the same bytes, or refused; connecting ends in success or in the same refusal.
#include <fuzzer/FuzzedDataProvider.h>

#include <array>
#include <memory>

#include "edited.h"
#include "errors.h"
#include "fabric/libfabric_address.h"
#include "fabric/libfabric_fabric.h"
#include "outcomes.h"
#include "protocol/limits.h"

using namespace efa_ep;
using fuzzing::require;

namespace {

fuzzing::Outcome refused("refused");
fuzzing::Outcome connected("connected");

/// A rank that connects to whoever introduces himself; a new one when it knows a full world.
class Target {
 public:
  Target() : fabric_(std::make_unique<LibfabricFabric>(options())) {
    fabric_->register_memory(memory_.data(), memory_.size());
  }
  std::vector<std::byte> address() const { return fabric_->address(); }
  void connect(const std::vector<std::byte>& address) { fabric_->connect(next_peer_, address), ++next_peer_; }
  bool full() const { return next_peer_ == kMaxRanks; }

 private:
  static LibfabricOptions options() {
    LibfabricOptions options;
    options.provider = "tcp";
    options.interface = "lo";
    options.peers = 8;
    return options;
  }
  alignas(16) std::array<std::byte, 64> memory_{};
  std::unique_ptr<LibfabricFabric> fabric_;
  uint32_t next_peer_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzzing::Outcome::count_input();
  FuzzedDataProvider input(data, size);
  static auto target = std::make_unique<Target>();
  if (target->full()) target = std::make_unique<Target>();
  std::vector<std::byte> address;
  if (input.ConsumeIntegralInRange(0, 7) == 0) {
    address = input.ConsumeRemainingBytes<std::byte>();
  } else {
    address = fuzzing::edited(target->address(), input);
  }
  try {
    require(FabricAddress::decode(address).encode() == address, "an address has one spelling");
    target->connect(address);
    ++connected;
  } catch (const ProtocolError&) {
    ++refused;
  }
  return 0;
}
