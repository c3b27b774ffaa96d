// What the tests have in common with their environment: seeds, size, patience.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace efa_ep {

/// The seed of a random test: TEST_SEED, or the test's own, so that runs repeat. Failures print it.
inline uint64_t test_seed(uint64_t own) {
  const char* text = std::getenv("TEST_SEED");
  return text == nullptr ? own : std::stoull(text);
}

/// LONG_TESTS=1 asks for more seeds and rounds than fit into every run.
inline uint32_t amount(uint32_t usual, uint32_t extended) {
  const char* text = std::getenv("LONG_TESTS");
  return text != nullptr && std::string(text) == "1" ? extended : usual;
}

/// Whether a sanitizer looks on, under which all takes several times as long.
#ifdef EFA_EP_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// Whether ThreadSanitizer looks on: what one thread does for long has no races, and is for the other builds.
#ifdef EFA_EP_SANITIZED_THREAD
inline constexpr bool kThreadSanitized = true;
#else
inline constexpr bool kThreadSanitized = false;
#endif

/// Far longer than any wait that ends, under a sanitizer and on a machine that has more to do.
inline constexpr std::chrono::minutes kPatience{5};

/// The deadline of a test's own waiting, so that a hang is a failure.
class Patience {
 public:
  void check() const {
    if (std::chrono::steady_clock::now() > end_) throw std::runtime_error("waited for minutes in vain");
  }

 private:
  const std::chrono::steady_clock::time_point end_ = std::chrono::steady_clock::now() + kPatience;
};

}  // namespace efa_ep
