// One proxy, and peers that the test plays itself, write by write.
#pragma once

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "loopback_network.h"
#include "protocol/chunking.h"
#include "protocol/round.h"
#include "proxy/proxy.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {

/// All rows of one round from one node to another: what one pair sends in one operation.
struct Shipment {
  uint32_t channel = 0;
  Operation operation = Operation::kDispatch;
  uint32_t round = 1;
  uint32_t rows = 0;
};

/// Nodes of one rank each. Rank 0 runs the proxy under test; the others have a bare endpoint.
class ProxyTest : public testing::Test {
 protected:
  static constexpr uint32_t kMaxTokens = 48;
  static constexpr uint64_t kChunkBytes = 96;  // three dispatch rows, or two combine rows
  static constexpr std::chrono::hours kForever{1};

  ProxyTest() : seed_(test_seed(31)), random_(seed_) {
    layout_.row = {.top_k = 1, .payload_bytes = 16, .scale_bytes = 0, .combine_bytes = 48};
    layout_.max_tokens = kMaxTokens;
    layout_.channels = 2;
    network_options_.rails = 2;
    network_options_.completion_queue_depth = 1 << 20;  // peers poll when a test lets them
    proxy_options_.timeout = kForever;
  }

  /// Builds the world. Change layout_, network_options_ and proxy_options_ before.
  void start(uint32_t nodes, bool with_thread = false) {
    proxy_.reset();
    arenas_.clear();
    layout_.topology = {nodes, 1};
    network_options_.ranks = nodes;
    network_options_.seed = seed_;
    network_ = std::make_unique<LoopbackNetwork>(network_options_);
    for (uint32_t rank = 0; rank < nodes; ++rank) {
      arenas_.emplace_back(layout_.total_bytes());
      network_->endpoint(rank).register_memory(arenas_[rank].data(), arenas_[rank].bytes());
    }
    for (uint32_t rank = 0; rank < nodes; ++rank) {
      for (uint32_t peer = 0; peer < nodes; ++peer) {
        if (peer != rank) network_->endpoint(rank).connect(peer, network_->endpoint(peer).address());
      }
    }
    proxy_options_.layout = layout_;
    proxy_options_.chunk_bytes = kChunkBytes;
    proxy_.emplace(network_->endpoint(0), arenas_[0].data(), proxy_options_, with_thread);
  }

  Chunking chunking(const Shipment& shipment) const {
    return Chunking::of(shipment.rows, layout_.row_bytes(shipment.operation), proxy_->chunk_bytes(),
                        network_options_.rails);
  }
  Immediate immediate(uint32_t source, const Shipment& shipment, uint32_t chunk) const {
    return {.round_tag = shipment.round % Immediate::kRoundPeriod,
            .operation = shipment.operation,
            .channel = shipment.channel,
            .source_node = source,
            .first = chunk == 0,
            .value = chunk == 0 ? shipment.rows : chunk};
  }
  /// The bytes that a shipment from `source` to `target` carries.
  Bytes content(uint32_t source, uint32_t target, const Shipment& shipment) const {
    std::mt19937_64 random(
        ((shipment.round * 2 + shipment.channel) * kOperations + static_cast<uint32_t>(shipment.operation)) *
            10'000 +
        source * 100 + target);
    Bytes bytes(shipment.rows * layout_.row_bytes(shipment.operation));
    for (std::byte& byte : bytes) byte = std::byte(random());
    return bytes;
  }
  /// Where a shipment waits in the source's arena, in bytes.
  size_t staging(uint32_t source, uint32_t target, const Shipment& shipment) const {
    return layout_.outgoing(shipment.channel, shipment.operation) +
           layout_.staged_row(source, target) * layout_.row_bytes(shipment.operation);
  }
  /// Puts the shipment's bytes into the source's staging.
  void stage(uint32_t source, uint32_t target, const Shipment& shipment) {
    const Bytes bytes = content(source, target, shipment);
    std::copy(bytes.begin(), bytes.end(), arenas_[source].data() + staging(source, target, shipment));
  }
  /// Hands the shipment of rank 0 to its proxy.
  void submit(uint32_t target, const Shipment& shipment) {
    stage(0, target, shipment);
    const Chunking cut = chunking(shipment);
    for (uint32_t chunk = 0; chunk < cut.chunks; ++chunk) {
      const Command command{.immediate = immediate(0, shipment, chunk).encode(),
                            .destination_node = static_cast<uint16_t>(target),
                            .local_row = layout_.staged_row(0, target) + cut.first_row(chunk),
                            .first_row = static_cast<uint16_t>(cut.first_row(chunk)),
                            .rows = static_cast<uint16_t>(cut.rows_in(chunk))};
      while (!proxy_->try_submit(command)) proxy_->help();
    }
  }
  /// Writes one chunk from a bare endpoint into rank 0.
  void write_chunk(uint32_t source, const Shipment& shipment, uint32_t chunk) {
    const Chunking cut = chunking(shipment);
    const uint64_t row = layout_.row_bytes(shipment.operation);
    const uint64_t start = cut.first_row(chunk) * row;
    write({.peer = 0,
           .rail = chunk % network_options_.rails,
           .local_offset = staging(source, 0, shipment) + start,
           .remote_offset = layout_.slot(shipment.channel, shipment.operation, 0, source) + start,
           .bytes = static_cast<uint32_t>(cut.rows_in(chunk) * row),
           .immediate = immediate(source, shipment, chunk).encode()},
          source);
  }
  /// A whole shipment from a bare endpoint, its chunks in random order, when its staging is free.
  void write_all(uint32_t source, const Shipment& shipment) {
    const Patience patience;
    while (network_->traffic(source).outstanding[0] > 0) {
      poll(source);
      patience.check();
    }
    stage(source, 0, shipment);
    std::vector<uint32_t> order(chunking(shipment).chunks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (const uint32_t chunk : order) write_chunk(source, shipment, chunk);
  }
  void write(const WriteRequest& request, uint32_t source) {
    while (network_->endpoint(source).post_write(request) == PostResult::kAgain) poll(source);
  }
  /// What a bare endpoint is told now: immediates of arrivals.
  std::vector<uint32_t> poll(uint32_t rank) {
    std::vector<Completion> completions(16);
    const size_t count = network_->endpoint(rank).poll(completions);
    std::vector<uint32_t> immediates;
    for (size_t i = 0; i < count; ++i) {
      if (completions[i].kind == CompletionKind::kArrival) immediates.push_back(completions[i].immediate);
    }
    return immediates;
  }

  RoundWord arrival(const Shipment& shipment, uint32_t source) const {
    return RoundWord::decode(word(layout_.arrival(shipment.channel, shipment.operation, source)));
  }
  uint64_t word(size_t offset) const {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(arenas_[0].data() + offset))
        .load(std::memory_order_acquire);
  }
  /// Whether rank `target` has the shipment's bytes in its slot.
  bool has_arrived(uint32_t source, uint32_t target, const Shipment& shipment) const {
    const Bytes bytes = content(source, target, shipment);
    return std::equal(
        bytes.begin(), bytes.end(),
        arenas_[target].data() + layout_.slot(shipment.channel, shipment.operation, target, source));
  }
  /// Lets the proxy work in this thread until `done`.
  void help_until(const std::function<bool()>& done) {
    const Patience patience;
    while (!done()) {
      proxy_->help();
      proxy_->throw_if_failed();
      patience.check();
    }
  }
  /// Waits without helping: the proxy's own thread has to do the work.
  void wait_until(const std::function<bool()>& done) {
    const Patience patience;
    while (!done()) {
      proxy_->throw_if_failed();
      patience.check();
      sched_yield();
    }
  }

  const uint64_t seed_;
  std::mt19937_64 random_;
  Layout layout_;
  LoopbackNetwork::Options network_options_;
  ProxyOptions proxy_options_;
  std::vector<TestMemory> arenas_;
  std::unique_ptr<LoopbackNetwork> network_;
  std::optional<Proxy> proxy_;
  const testing::ScopedTrace trace_{__FILE__, __LINE__, testing::Message() << "TEST_SEED=" << seed_};
};

}  // namespace efa_ep
