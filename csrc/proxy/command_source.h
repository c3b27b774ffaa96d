// Where a proxy finds commands that were not submitted by a thread of its process.
#pragma once

#include "proxy/command_ring.h"

namespace efa_ep {

/// Commands that a device leaves in memory. Used by whoever does the proxy's work, one thread at a time.
class CommandSource {
 public:
  /// Returns false if none is there.
  virtual bool try_pop(Command& command) = 0;
  /// Whether none is there.
  virtual bool empty() const = 0;
  /// The proxy has failed: what the device waits for will not come.
  virtual void end_waits() = 0;

 protected:
  ~CommandSource() = default;
};

}  // namespace efa_ep
