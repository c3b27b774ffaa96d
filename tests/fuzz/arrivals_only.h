// A fabric that reports the arrivals that a target makes up, and takes no writes.
#pragma once

#include <algorithm>
#include <deque>
#include <span>
#include <vector>

#include "fabric/fabric.h"

namespace efa_ep::fuzzing {

class ArrivalsOnly final : public Fabric {
 public:
  ArrivalsOnly() {
    description_.nics = {"first", "second"};
    description_.send_queue_depth = 16;
    description_.completion_queue_depth = 1 << 20;
    description_.max_write_bytes = 1 << 20;
  }
  void deliver(uint32_t immediate) {
    Completion& arrival = arrivals_.emplace_back();
    arrival.kind = CompletionKind::kArrival;
    arrival.immediate = immediate;
  }

  const FabricDescription& description() const override { return description_; }
  void register_memory(std::byte*, size_t) override {}
  std::vector<std::byte> address() const override { return {}; }
  void connect(uint32_t, std::span<const std::byte>) override {}
  PostResult post_write(const WriteRequest&) override { return PostResult::kAgain; }
  size_t poll(std::span<Completion> completions) override {
    const size_t count = std::min(completions.size(), arrivals_.size());
    std::move(arrivals_.begin(), arrivals_.begin() + static_cast<ptrdiff_t>(count), completions.begin());
    arrivals_.erase(arrivals_.begin(), arrivals_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }

 private:
  FabricDescription description_;
  std::deque<Completion> arrivals_;
};

}  // namespace efa_ep::fuzzing
