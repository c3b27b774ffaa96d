// Which rank owns an expert, and which of the owner's experts it is.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "errors.h"
#include "protocol/limits.h"

namespace efa_ep {

/// The owner of an expert whose rank is gone: slots that name the expert are dropped.
inline constexpr uint32_t kNoOwner = std::numeric_limits<uint32_t>::max();

class Placement {
 public:
  /// `owner_of[e]` is the rank that hosts (physical) expert e, or kNoOwner, for every expert. An owner
  /// numbers its experts in ascending order of their global ids. Throws ConfigurationError for an owner
  /// outside the world.
  Placement(std::vector<uint32_t> owner_of, uint32_t world)
      : owner_(std::move(owner_of)), local_(owner_.size()) {
    std::vector<uint32_t> hosted(world, 0);
    for (size_t expert = 0; expert < owner_.size(); ++expert) {
      if (owner_[expert] == kNoOwner) continue;
      if (owner_[expert] >= world) {
        throw ConfigurationError("expert " + std::to_string(expert) + " is placed on rank " +
                                 std::to_string(owner_[expert]) + ", but the world has " +
                                 std::to_string(world) + " ranks; use ranks 0 to " +
                                 std::to_string(world - 1));
      }
      local_[expert] = hosted[owner_[expert]]++;
    }
  }

  uint32_t experts() const { return static_cast<uint32_t>(owner_.size()); }
  /// The expert's rank. `expert` >= 0; rows of peers are not trusted further than that, so an id beyond the
  /// last expert throws ProtocolError.
  uint32_t owner(int32_t expert) const {
    if (static_cast<uint32_t>(expert) >= owner_.size()) {
      throw ProtocolError("a received row names expert " + std::to_string(expert) + " of " +
                          std::to_string(owner_.size()) + "; its memory was overwritten by a foreign writer");
    }
    return owner_[static_cast<uint32_t>(expert)];
  }
  /// Index of the expert among its owner's experts.
  uint32_t local(int32_t expert) const { return local_[static_cast<uint32_t>(expert)]; }
  uint32_t hosted_by(uint32_t rank) const {
    uint32_t count = 0;
    for (const uint32_t owner : owner_) count += owner == rank ? 1 : 0;
    return count;
  }

 private:
  std::vector<uint32_t> owner_;
  std::vector<uint32_t> local_;
};

}  // namespace efa_ep
