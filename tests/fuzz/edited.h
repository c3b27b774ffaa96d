// A genuine message with a few bytes changed: where the input of a target says so, and to what.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cstddef>
#include <vector>

namespace efa_ep::fuzzing {

inline std::vector<std::byte> edited(std::vector<std::byte> message, FuzzedDataProvider& input) {
  for (auto changes = input.ConsumeIntegralInRange(0, 6); changes > 0 && !message.empty(); --changes) {
    const auto at = input.ConsumeIntegralInRange<size_t>(0, message.size() - 1);
    switch (input.ConsumeIntegralInRange(0, 7)) {
      case 0:
        message.resize(at);
        break;
      case 1:
        message.insert(message.begin() + static_cast<ptrdiff_t>(at),
                       std::byte(input.ConsumeIntegral<uint8_t>()));
        break;
      case 2:
        message[at] = std::byte(input.ConsumeIntegral<uint8_t>());
        break;
      default:
        message[at] ^= std::byte(1U << input.ConsumeIntegralInRange(0, 7));
    }
  }
  return message;
}

}  // namespace efa_ep::fuzzing
