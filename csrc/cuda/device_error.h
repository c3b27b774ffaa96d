// What a kernel says when it cannot go on. Kernels never trap: the first fault of an instance is written to a
// word that the host watches, and every later kernel of the instance leaves at once.
#pragma once

#include <array>
#include <cstdint>

#include "protocol/half.h"

namespace efa_ep::cuda {

enum class Fault : uint32_t {
  kNone,
  kTimeout,        ///< `rank` did not answer before the deadline: RankTimeoutError
  kStopped,        ///< the host ended the wait through DeviceMemory::stop, and knows why
  kTooManyTokens,  ///< `detail` tokens, more than max_tokens: ConfigurationError, nothing was sent
  kExpertId,       ///< top-k id `detail` is out of range: ConfigurationError, nothing was sent
  kRowCount,       ///< `rank` announced `detail` rows, more or fewer than there can be: ProtocolError
  kRowNumber,      ///< the list of `rank` names row `detail`, which does not exist: ProtocolError
  kRowExpert,      ///< a row from `rank` names expert `detail`, which does not exist: ProtocolError
};

struct DeviceError {
  Fault fault = Fault::kNone;
  Half half = Half::kDispatchSend;
  uint32_t channel = 0;
  uint32_t rank = 0;  ///< the one waited for, or whose data is wrong; the own one if that is its proxy
  uint32_t round = 0;
  int64_t detail = 0;

  constexpr bool operator==(const DeviceError&) const = default;

  /// As in memory. The first word is 0 without a fault and is written last, with release.
  constexpr std::array<uint64_t, 2> encode() const {
    return {uint64_t{round} << 32 | uint64_t{rank} << 16 | channel << 12 | static_cast<uint32_t>(half) << 8 |
                static_cast<uint32_t>(fault),
            static_cast<uint64_t>(detail)};
  }
  static constexpr DeviceError decode(std::array<uint64_t, 2> words) {
    const auto low = static_cast<uint32_t>(words[0]);
    return {.fault = static_cast<Fault>(low & 0xFFu),
            .half = static_cast<Half>(low >> 8 & 0xFu),
            .channel = low >> 12 & 0xFu,
            .rank = low >> 16,
            .round = static_cast<uint32_t>(words[0] >> 32),
            .detail = static_cast<int64_t>(words[1])};
  }
};

}  // namespace efa_ep::cuda
