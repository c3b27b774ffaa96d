// The four halves of a round, in their order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace efa_ep {

enum class Half : uint32_t { kDispatchSend, kDispatchRecv, kCombineSend, kCombineRecv };
inline constexpr size_t kHalves = 4;
inline constexpr std::array<const char*, kHalves> kHalfNames = {"dispatch_send", "dispatch_recv",
                                                                "combine_send", "combine_recv"};

}  // namespace efa_ep
