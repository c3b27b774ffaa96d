// Bare ranks on an emulated network, and a record of what each was told and when.
#pragma once

#include <errno.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fabric/emulated_fabric.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {

using namespace std::chrono_literals;

/// Numbers with which a head computes times: a byte takes 1 ns, a piece has 100 bytes, nothing is random but
/// order.
inline EmulatedProfile plain_profile() {
  EmulatedProfile profile;
  profile.name = "plain";
  profile.nics = 1;
  profile.bytes_per_second = 1'000'000'000;
  profile.latency = 5us;
  profile.mtu = 100;
  profile.interleaved_writes = 4;
  profile.send_queue_depth = 64;
  profile.completion_queue_depth = 256;
  profile.max_write_bytes = 1 << 20;
  profile.retransmit_timeout = 50us;
  profile.unreachable_after = 10ms;
  return profile;
}

/// The command that repeats the test that is running.
inline std::string replay(uint64_t seed) {
  const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
  return "replay: TEST_SEED=" + std::to_string(seed) + " " + program_invocation_name +
         " --gtest_filter=" + test->test_suite_name() + "." + test->name();
}

/// Something that a rank was told.
struct Told {
  uint32_t rank;
  std::chrono::nanoseconds time;
  Completion completion;
};

class EmulatedTest : public ::testing::Test {
 protected:
  static constexpr size_t kMemory = 64 * 1024;

  EmulatedTest() : seed_(test_seed(51)) {}

  /// All ranks connect all ranks. Change profile_ before.
  void start(uint32_t ranks) { start(ranks, seed_); }
  void start(uint32_t ranks, uint64_t seed) {
    fabrics_.clear();
    memories_.clear();
    told_.clear();
    network_.emplace(EmulatedNetworkOptions{profile_, seed, 1000, true});
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      memories_.emplace_back(kMemory);
      add(rank);
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      for (uint32_t peer = 0; peer < ranks; ++peer) connect(rank, peer);
    }
  }
  /// A new incarnation of a rank, connected with nobody.
  void add(uint32_t rank) {
    fabrics_[rank] = std::make_unique<EmulatedFabric>(*network_, rank);
    fabrics_[rank]->register_memory(memories_[rank].data(), kMemory);
  }
  void connect(uint32_t rank, uint32_t peer) { fabric(rank).connect(peer, fabric(peer).address()); }

  EmulatedFabric& fabric(uint32_t rank) { return *fabrics_.at(rank); }
  std::byte* memory(uint32_t rank) { return memories_[rank].data(); }
  void fill(uint32_t rank, std::byte value) { std::fill_n(memory(rank), kMemory, value); }
  /// How many of a rank's first `bytes` bytes have the value.
  size_t bytes_with(uint32_t rank, std::byte value, size_t bytes) {
    return static_cast<size_t>(std::count(memory(rank), memory(rank) + bytes, value));
  }

  /// Posts `bytes` bytes from the start of one memory to the start of the other.
  PostResult post(uint32_t source, uint32_t target, uint32_t bytes, uint32_t number = 0, uint32_t rail = 0) {
    return fabric(source).post_write({.peer = target,
                                      .rail = rail,
                                      .local_offset = 0,
                                      .remote_offset = 0,
                                      .bytes = bytes,
                                      .immediate = number,
                                      .context = number});
  }

  /// Notes what every rank is told now.
  void poll_all() {
    std::array<Completion, 8> completions;
    for (const auto& [rank, fabric] : fabrics_) {
      if (!fabric) continue;
      while (const size_t count = fabric->poll(completions)) {
        for (size_t i = 0; i < count; ++i) told_.push_back({rank, network_->now(), completions[i]});
      }
    }
  }
  /// Lets everything happen that will, and polls all the time.
  void run() {
    do poll_all();
    while (network_->advance());
  }
  void run_until(std::chrono::nanoseconds time) {
    while (network_->next_event() && *network_->next_event() <= time) {
      network_->advance();
      poll_all();
    }
    network_->advance_to(time);
  }

  std::vector<Told> told(uint32_t rank, CompletionKind kind) const {
    std::vector<Told> found;
    for (const Told& told : told_) {
      if (told.rank == rank && told.completion.kind == kind) found.push_back(told);
    }
    return found;
  }
  std::vector<Told> arrivals(uint32_t rank) const { return told(rank, CompletionKind::kArrival); }
  std::vector<Told> done(uint32_t rank) const { return told(rank, CompletionKind::kWriteDone); }
  std::vector<Told> errors(uint32_t rank) const { return told(rank, CompletionKind::kError); }
  /// The only error of a rank; fails the test if that is not so.
  std::string error_of(uint32_t rank) const {
    const std::vector<Told> found = errors(rank);
    EXPECT_EQ(found.size(), 1U);
    return found.empty() ? "" : found.front().completion.error;
  }

  const uint64_t seed_;
  EmulatedProfile profile_ = plain_profile();
  std::optional<EmulatedNetwork> network_;
  std::vector<TestMemory> memories_;
  std::map<uint32_t, std::unique_ptr<EmulatedFabric>> fabrics_;  // by rank
  std::vector<Told> told_;
  const ::testing::ScopedTrace trace_{__FILE__, __LINE__, replay(seed_)};
};

}  // namespace efa_ep
