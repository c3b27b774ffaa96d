// A network that takes every write and moves nothing: what is left when the proxy runs on it is the proxy's
// own cost.
#pragma once

#include <deque>
#include <string>

#include "errors.h"
#include "fabric/fabric.h"

namespace efa_ep {

class NullFabric final : public Fabric {
 public:
  /// `rails` NICs that each hold `send_queue_depth` writes until they are polled.
  NullFabric(uint32_t rails, uint32_t send_queue_depth) : in_flight_(rails) {
    description_.provider = "null";
    for (uint32_t i = 0; i < rails; ++i) description_.nics.push_back("null" + std::to_string(i));
    description_.send_queue_depth = send_queue_depth;
    description_.completion_queue_depth = UINT32_MAX;  // nothing ever arrives
    description_.max_write_bytes = UINT32_MAX;
  }

  const FabricDescription& description() const override { return description_; }
  void register_memory(std::byte*, size_t) override {}
  std::vector<std::byte> address() const override { return {}; }
  void connect(uint32_t, std::span<const std::byte>) override {}

  PostResult post_write(const WriteRequest& request) override {
    if (request.rail >= in_flight_.size()) {
      throw ConfigurationError("rail " + std::to_string(request.rail) + " does not exist");
    }
    std::deque<uint64_t>& writes = in_flight_[request.rail];
    if (writes.size() >= description_.send_queue_depth) return PostResult::kAgain;
    writes.push_back(request.context);
    return PostResult::kPosted;
  }

  size_t poll(std::span<Completion> completions) override {
    size_t filled = 0;
    for (std::deque<uint64_t>& writes : in_flight_) {
      for (; !writes.empty() && filled < completions.size(); writes.pop_front()) {
        completions[filled] = Completion{};
        completions[filled++].context = writes.front();
      }
    }
    return filled;
  }

 private:
  FabricDescription description_;
  std::vector<std::deque<uint64_t>> in_flight_;  // contexts, by rail
};

}  // namespace efa_ep
