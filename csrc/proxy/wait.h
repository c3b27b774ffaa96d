// A wait in progress, as it appears to whoever may end it before its deadline.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

namespace efa_ep {

struct Wait {
  const char* half;                       ///< as in RankTimeoutError
  uint32_t round;                         ///< as in RankTimeoutError
  std::function<std::string()> describe;  ///< how long it has waited for whom, in words
};

/// Called about ten times a second during a wait; throws to end it.
using InterruptCheck = std::function<void(const Wait&)>;
inline constexpr auto kInterruptCheckTime = std::chrono::milliseconds(100);

}  // namespace efa_ep
