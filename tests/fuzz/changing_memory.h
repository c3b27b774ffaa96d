// Memory that another process changes between any two accesses of this one, repeatably: what a check read is
// not what a use reads, unless the code read it once.
//
// While an instance lives, its pages are locked. Each instruction that touches them faults, runs alone with
// the pages unlocked, and then the pages are locked again, after `change` has had its way with them. For one
// thread, on Linux and x86-64; elsewhere the memory stays as it is.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

namespace efa_ep::fuzzing {

class ChangingMemory {
 public:
  /// Called after each access with the address that was touched.
  using Change = std::function<void(std::byte* touched)>;

  /// `memory`: whole pages, which outlive this. One instance at a time.
  ChangingMemory(std::vector<std::span<std::byte>> memory, Change change);
  ~ChangingMemory();
  ChangingMemory(const ChangingMemory&) = delete;
  ChangingMemory& operator=(const ChangingMemory&) = delete;

  static bool supported();
};

}  // namespace efa_ep::fuzzing
