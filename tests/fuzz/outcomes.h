// What the targets have in common: an oracle that fails the run, and the proof that inputs reach every end.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace efa_ep::fuzzing {

/// Ends the process, so that libFuzzer keeps the input, if the code under test broke a promise.
inline void require(bool holds, const char* promise) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

/// Counts how inputs end. At the end of the process each kind must have occurred, or the target would test
/// less than it says: for instance nothing behind the first check.
class Outcome {
 public:
  explicit Outcome(const char* name) : name_(name) {}
  Outcome(const Outcome&) = delete;
  Outcome& operator=(const Outcome&) = delete;
  ~Outcome() {
    std::fprintf(stderr, "%s: %llu\n", name_, static_cast<unsigned long long>(count_));
    // A replay of one input ends in one way.
    if (count_ == 0 && inputs_ > kFew) {
      std::fprintf(stderr, "no input ended like that\n");
      std::_Exit(1);
    }
  }
  void operator++() { ++count_; }
  static void count_input() { ++inputs_; }

 private:
  static constexpr uint64_t kFew = 1000;
  static inline uint64_t inputs_ = 0;
  const char* name_;
  uint64_t count_ = 0;
};

}  // namespace efa_ep::fuzzing
