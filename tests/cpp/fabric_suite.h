// Several ranks of a Fabric in one process, driven by one thread, and the traffic that every Fabric must
// carry.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fabric/fabric.h"

namespace efa_ep::testing {

/// Nothing here may take longer; a test that reaches this is a hang.
inline constexpr std::chrono::seconds kDeadline{300};

class FabricCluster {
 public:
  using Factory = std::function<std::unique_ptr<Fabric>(uint32_t rank)>;
  using Handler = std::function<void(uint32_t rank, const Completion& completion)>;

  /// Makes `ranks` fabrics with `bytes` bytes of zeroed memory each and connects all to all, also to
  /// themselves.
  FabricCluster(uint32_t ranks, size_t bytes, const Factory& factory) : memories_(ranks) {
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      memories_[rank].resize(bytes);
      fabrics_.push_back(factory(rank));
      fabrics_.back()->register_memory(memories_[rank].data(), bytes);
    }
    for (const auto& fabric : fabrics_) {
      for (uint32_t peer = 0; peer < ranks; ++peer) fabric->connect(peer, fabrics_[peer]->address());
    }
  }

  uint32_t ranks() const { return static_cast<uint32_t>(fabrics_.size()); }
  Fabric& fabric(uint32_t rank) { return *fabrics_[rank]; }
  std::byte* memory(uint32_t rank) { return memories_[rank].data(); }
  void destroy(uint32_t rank) { fabrics_[rank].reset(); }

  /// Polls every living rank once.
  void poll(const Handler& handler) {
    std::array<Completion, 16> completions;
    size_t seen = 0;
    for (uint32_t rank = 0; rank < ranks(); ++rank) {
      if (!fabrics_[rank]) continue;
      const size_t count = fabrics_[rank]->poll(completions);
      for (size_t i = 0; i < count; ++i) handler(rank, completions[i]);
      seen += count;
    }
    if (seen == 0) std::this_thread::yield();
  }

  /// Polls until `done`; fails the test at the deadline.
  void poll_until(const std::function<bool()>& done, const Handler& handler) {
    const auto deadline = std::chrono::steady_clock::now() + kDeadline;
    while (!done()) {
      if (std::chrono::steady_clock::now() > deadline)
        throw std::runtime_error("deadline passed while polling");
      poll(handler);
    }
  }

  /// Posts, polling as long as the fabric answers "again".
  void write(uint32_t rank, const WriteRequest& request, const Handler& handler) {
    poll_until([&] { return fabrics_[rank]->post_write(request) == PostResult::kPosted; }, handler);
  }

 private:
  std::vector<std::vector<std::byte>> memories_;  // outlives the fabrics that registered it
  std::vector<std::unique_ptr<Fabric>> fabrics_;
};

inline std::byte payload_byte(uint32_t source, uint32_t destination, uint32_t index, size_t position) {
  return static_cast<std::byte>(source * 89 + destination * 31 + index * 7 + position * 13 + (position >> 8) +
                                1);
}

/// Every rank writes `sizes[i]` bytes to every rank for each i, over rail i modulo rails, in an order drawn
/// from `seed`. Each payload is compared byte by byte in the moment its immediate arrives, and every write
/// must arrive and complete exactly once.
class AllToAll {
 public:
  AllToAll(uint32_t ranks, std::vector<uint32_t> sizes) : ranks_(ranks), sizes_(std::move(sizes)) {
    for (const uint32_t size : sizes_) {
      offsets_.push_back(bytes_per_peer_);
      bytes_per_peer_ += size + kGap;
    }
  }

  /// Memory that each rank needs: what it sends to each rank, then what it receives from each rank.
  size_t memory_bytes() const { return 2 * ranks_ * bytes_per_peer_; }

  void run(FabricCluster& cluster, uint64_t seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::vector<std::pair<uint32_t, uint32_t>> order;  // (source, message)
    for (uint32_t source = 0; source < ranks_; ++source) {
      for (uint32_t message = 0; message < messages(); ++message) order.emplace_back(source, message);
    }
    std::mt19937_64 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    fill(cluster);

    const auto handler = [&](uint32_t rank, const Completion& completion) {
      check(cluster, rank, completion);
    };
    for (const auto& [source, message] : order) {
      WriteRequest request;
      request.peer = message / static_cast<uint32_t>(sizes_.size());
      const uint32_t index = message % static_cast<uint32_t>(sizes_.size());
      request.rail = index % cluster.fabric(source).rails();
      request.local_offset = sent_at(request.peer, index);
      request.remote_offset = received_at(source, index);
      request.bytes = sizes_[index];
      request.immediate = immediate(source, index);
      request.context = (uint64_t{1} << 40) + message;
      cluster.write(source, request, handler);
    }
    const size_t total = order.size();
    cluster.poll_until([&] { return arrived_.size() >= total && done_.size() >= total; }, handler);
    EXPECT_EQ(arrived_.size(), total);
    EXPECT_EQ(done_.size(), total);
    check_gaps(cluster);
  }

 private:
  static constexpr size_t kGap = 64;  // untouched bytes behind each payload

  uint32_t messages() const { return ranks_ * static_cast<uint32_t>(sizes_.size()); }
  size_t sent_at(uint32_t peer, uint32_t index) const { return peer * bytes_per_peer_ + offsets_[index]; }
  size_t received_at(uint32_t source, uint32_t index) const {
    return (ranks_ + source) * bytes_per_peer_ + offsets_[index];
  }
  // Counts down from the largest, so that all 32 bits matter.
  uint32_t immediate(uint32_t source, uint32_t index) const {
    return UINT32_MAX - (source * static_cast<uint32_t>(sizes_.size()) + index);
  }

  void fill(FabricCluster& cluster) const {
    for (uint32_t source = 0; source < ranks_; ++source) {
      for (uint32_t peer = 0; peer < ranks_; ++peer) {
        for (uint32_t index = 0; index < sizes_.size(); ++index) {
          for (size_t i = 0; i < sizes_[index]; ++i) {
            cluster.memory(source)[sent_at(peer, index) + i] = payload_byte(source, peer, index, i);
          }
        }
      }
    }
  }

  void check(FabricCluster& cluster, uint32_t rank, const Completion& completion) {
    if (completion.kind == CompletionKind::kWriteDone) {
      EXPECT_TRUE(done_.emplace(rank, completion.context).second) << "write completed twice";
      EXPECT_LT(completion.context - (uint64_t{1} << 40), messages()) << "context of no write";
      return;
    }
    ASSERT_EQ(completion.kind, CompletionKind::kArrival) << completion.error;
    const uint32_t number = UINT32_MAX - completion.immediate;
    const auto source = number / static_cast<uint32_t>(sizes_.size());
    const auto index = number % static_cast<uint32_t>(sizes_.size());
    ASSERT_LT(source, ranks_) << "immediate " << completion.immediate << " of no write";
    EXPECT_TRUE(arrived_.emplace(rank, completion.immediate).second) << "write arrived twice";
    const std::byte* received = cluster.memory(rank) + received_at(source, index);
    for (size_t i = 0; i < sizes_[index]; ++i) {
      ASSERT_EQ(received[i], payload_byte(source, rank, index, i))
          << "byte " << i << " of " << sizes_[index] << " from rank " << source << " to rank " << rank;
    }
  }

  void check_gaps(FabricCluster& cluster) const {
    for (uint32_t rank = 0; rank < ranks_; ++rank) {
      for (uint32_t source = 0; source < ranks_; ++source) {
        for (uint32_t index = 0; index < sizes_.size(); ++index) {
          const std::byte* gap = cluster.memory(rank) + received_at(source, index) + sizes_[index];
          EXPECT_TRUE(std::all_of(gap, gap + kGap, [](std::byte value) { return value == std::byte{0}; }));
        }
      }
    }
  }

  uint32_t ranks_;
  std::vector<uint32_t> sizes_;
  std::vector<size_t> offsets_;
  size_t bytes_per_peer_ = 0;
  std::set<std::pair<uint32_t, uint32_t>> arrived_;  // (rank, immediate)
  std::set<std::pair<uint32_t, uint64_t>> done_;     // (rank, context)
};

}  // namespace efa_ep::testing
