// Ranks with tile puts on a loopback network, and threads that put and read everything at once.
#pragma once

#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "loopback_network.h"
#include "proxy/signal_policy.h"
#include "proxy/tile_puts.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {

/// A world of ranks with tile puts and nothing else. Rank r's memory: what it sends to each rank, then what
/// it receives from each rank, in groups of equal places.
class TileWorld {
 public:
  struct Options {
    uint32_t ranks = 3;
    uint32_t rails = 2;
    uint32_t groups = 3;
    uint64_t group_bytes = 4096;
    uint64_t chunk_bytes = 1024;
    uint32_t ring_commands = 16;
    uint32_t send_queue_depth = 8;
    uint32_t completion_queue_depth = 1024;
    uint32_t overrun_room = 1024;  ///< for groups that take more than the window
    SignalPolicyKind policy = SignalPolicyKind::kCounted;
    uint64_t seed = 1;
  };

  explicit TileWorld(const Options& options)
      : options_(options),
        network_({.ranks = options.ranks,
                  .rails = options.rails,
                  .send_queue_depth = options.send_queue_depth,
                  .completion_queue_depth = options.completion_queue_depth,
                  .overrun_room = options.overrun_room,
                  .seed = options.seed,
                  .honours_fence = true,
                  .early_completions = true}) {
    const uint32_t ranks = options.ranks;
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      memory_.emplace_back(2 * ranks * options.groups * options.group_bytes);
      network_.endpoint(rank).register_memory(memory_[rank].data(), memory_[rank].bytes());
      words_.emplace_back(TilePuts::words(ranks, options.groups));
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      for (uint32_t peer = 0; peer < ranks; ++peer) {
        network_.endpoint(rank).connect(peer, network_.endpoint(peer).address());
      }
      policies_.push_back(SignalPolicy::create(options.policy, network_.endpoint(rank)));
      tiles_.push_back(std::make_unique<TilePuts>(*policies_[rank], words_[rank],
                                                  TilePutOptions{.rank = rank,
                                                                 .ranks = ranks,
                                                                 .groups = options.groups,
                                                                 .chunk_bytes = options.chunk_bytes,
                                                                 .ring_commands = options.ring_commands}));
    }
  }

  const Options& options() const { return options_; }
  LoopbackNetwork& network() { return network_; }
  TilePuts& tiles(uint32_t rank) { return *tiles_[rank]; }
  SignalPolicy& policy(uint32_t rank) { return *policies_[rank]; }
  uint64_t sent_at(uint32_t peer, uint32_t group) const {
    return (uint64_t{peer} * options_.groups + group) * options_.group_bytes;
  }
  uint64_t received_at(uint32_t source, uint32_t group) const {
    return sent_at(options_.ranks + source, group);
  }
  std::byte* memory(uint32_t rank) { return memory_[rank].data(); }

 private:
  const Options options_;
  LoopbackNetwork network_;
  std::vector<TestMemory> memory_;
  std::vector<std::vector<uint64_t>> words_;
  std::vector<std::unique_ptr<SignalPolicy>> policies_;
  std::vector<std::unique_ptr<TilePuts>> tiles_;
};

/// Byte `at` of a group's content.
inline std::byte tile_content(uint32_t source, uint32_t target, uint32_t group, uint32_t generation,
                              uint64_t at) {
  return std::byte(source * 89 + target * 31 + group * 7 + generation * 57 + at * 13 + (at >> 8) + 1);
}

/// Runs generations of all groups between all ranks. Per rank: `producers` threads that fill and put tiles of
/// random sizes, one thread that works, one that reads what is signalled, byte by byte.
class Exchange {
 public:
  Exchange(TileWorld& world, uint32_t producers, uint32_t generations)
      : world_(world),
        producers_(producers),
        generations_(generations),
        read_(size_t{world.options().ranks} * world.options().ranks * world.options().groups) {}

  void run() {
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < world_.options().ranks; ++rank) {
      for (uint32_t producer = 0; producer < producers_; ++producer) {
        threads.emplace_back([=, this] { guard([=, this] { produce(rank, producer); }); });
      }
      threads.emplace_back([=, this] { guard([=, this] { work(rank); }); });
      threads.emplace_back([=, this] { guard([=, this] { read(rank); }); });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  template <class Action>
  void guard(Action action) {
    try {
      action();
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
      failed_ = true;
    }
  }

  /// Where the tiles of a group end: the same for all its producers. Some tiles are empty.
  std::vector<uint64_t> cuts(uint32_t source, uint32_t target, uint32_t group, uint32_t generation) const {
    std::mt19937_64 random(world_.options().seed * 1'000'003 + ((source * 64 + target) * 64 + group) * 64 +
                           generation);
    std::vector<uint64_t> ends(random() % 6);
    const uint64_t units = world_.options().group_bytes / kTileAlignment;
    for (uint64_t& end : ends) end = random() % (units + 1) * kTileAlignment;
    ends.push_back(world_.options().group_bytes);
    std::sort(ends.begin(), ends.end());
    return ends;
  }

  void produce(uint32_t rank, uint32_t producer) {
    const auto& options = world_.options();
    for (uint32_t generation = 0; generation < generations_; ++generation) {
      for (uint32_t group = 0; group < options.groups; ++group) {
        for (uint32_t peer = 0; peer < options.ranks; ++peer) {
          if (peer == rank) continue;
          // The places at both ends are free again, and so is the group.
          wait([&] {
            return read_of(rank, peer, group).load(std::memory_order_acquire) >= generation &&
                   world_.tiles(rank).sent(peer, group) >= generation;
          });
          put(rank, producer, peer, group, generation);
        }
      }
    }
  }

  void put(uint32_t rank, uint32_t producer, uint32_t peer, uint32_t group, uint32_t generation) {
    const std::vector<uint64_t> ends = cuts(rank, peer, group, generation);
    for (uint32_t tile = producer; tile < ends.size(); tile += producers_) {
      const uint64_t begin = tile == 0 ? 0 : ends[tile - 1];
      std::byte* staging = world_.memory(rank) + world_.sent_at(peer, group);
      for (uint64_t at = begin; at < ends[tile]; ++at) {
        staging[at] = tile_content(rank, peer, group, generation, at);
      }
      const TilePut put{.peer = peer,
                        .group = group,
                        .transfers = static_cast<uint32_t>(ends.size()),
                        .bytes = static_cast<uint32_t>(ends[tile] - begin),
                        .local_offset = world_.sent_at(peer, group) + begin,
                        .remote_offset = world_.received_at(rank, group) + begin};
      wait([&] { return world_.tiles(rank).try_submit(put); });
    }
  }

  void work(uint32_t rank) {
    const auto& options = world_.options();
    const uint64_t expected = uint64_t{options.ranks - 1} * options.groups * generations_;
    uint64_t finished = 0;
    wait([&] {
      if (!world_.tiles(rank).drive()) sched_yield();
      // Others need this rank's work until all is done: the loopback moves only while it is polled.
      if (finished == 0 && world_.tiles(rank).counters().signals == expected && world_.tiles(rank).idle()) {
        finished = 1;
        ++ranks_done_;
      }
      return ranks_done_ == options.ranks;
    });
  }

  void read(uint32_t rank) {
    const auto& options = world_.options();
    for (uint32_t generation = 0; generation < generations_; ++generation) {
      for (uint32_t group = 0; group < options.groups; ++group) {
        for (uint32_t source = 0; source < options.ranks; ++source) {
          if (source == rank) continue;
          wait([&] { return world_.tiles(rank).signal(source, group) > generation; });
          const std::byte* received = world_.memory(rank) + world_.received_at(source, group);
          for (uint64_t at = 0; at < options.group_bytes; ++at) {
            ASSERT_EQ(received[at], tile_content(source, rank, group, generation, at))
                << "byte " << at << " of group " << group << " from " << source << " to " << rank
                << ", generation " << generation;
          }
          read_of(source, rank, group).store(generation + 1, std::memory_order_release);
        }
      }
    }
  }

  std::atomic<uint32_t>& read_of(uint32_t source, uint32_t target, uint32_t group) {
    return read_[(size_t{source} * world_.options().ranks + target) * world_.options().groups + group];
  }

  template <class Done>
  void wait(Done done) {
    const Patience patience;
    while (!done()) {
      if (failed_ || ::testing::Test::HasFailure()) throw std::runtime_error("another thread failed");
      patience.check();
      sched_yield();
    }
  }

  TileWorld& world_;
  const uint32_t producers_;
  const uint32_t generations_;
  std::vector<std::atomic<uint32_t>> read_;  // generations that the target has read
  std::atomic<uint32_t> ranks_done_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace efa_ep
