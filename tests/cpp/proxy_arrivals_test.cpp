// A completion queue that overruns is lost, so the proxy cuts chunks of which the queue can hold all that the
// protocol lets arrive before the rank polls again.
#include <stdexcept>
#include <string>
#include <tuple>

#include "errors.h"
#include "protocol/arrivals.h"
#include "proxy_fixture.h"

namespace efa_ep {
namespace {

constexpr uint32_t kNodes = 4;
constexpr uint32_t kSendQueueDepth = 8;
// 16 chunks of dispatch and 24 of combine, from 3 sources on 2 channels over 2 NICs.
constexpr uint32_t kArrivals = 3 * 2 * (8 + 12);

class ProxyArrivalsTest : public ProxyTest {
 protected:
  void start_with_room(uint32_t arrivals) {
    network_options_.send_queue_depth = kSendQueueDepth;
    network_options_.completion_queue_depth = kSendQueueDepth + arrivals;
    start(kNodes);
  }

  /// Everybody sends rank 0 all that it may before rank 0 polls, and rank 0 has its send queues full, too.
  void burst(uint64_t chunk_bytes) {
    const uint32_t rails = network_options_.rails;
    for (uint32_t i = 0; i < kSendQueueDepth * rails; ++i) {
      network_->endpoint(0).post_write({.peer = 1, .rail = i % rails});
    }
    for (uint32_t source = 1; source < kNodes; ++source) {
      for (uint32_t channel = 0; channel < layout_.channels; ++channel) {
        for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
          const Shipment shipment{channel, operation, 1, kMaxTokens};
          const uint32_t chunks =
              Chunking::of(kMaxTokens, layout_.row_bytes(operation), chunk_bytes, rails).chunks;
          for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
            write({.peer = 0,
                   .rail = rail_of(source, 0, kNodes, chunk, rails),
                   .immediate = immediate(source, shipment, chunk).encode()},
                  source);
          }
        }
      }
    }
    const Patience patience;
    while (!network_->idle()) {
      for (uint32_t source = 1; source < kNodes; ++source) poll(source);
      patience.check();
    }
  }
};

TEST_F(ProxyArrivalsTest, ChunksThatFitStayAsTheyAre) {
  start_with_room(kArrivals);
  EXPECT_EQ(most_arrivals(layout_, kChunkBytes, 2), kArrivals);
  EXPECT_EQ(proxy_->chunk_bytes(), kChunkBytes);
  EXPECT_NO_THROW(burst(proxy_->chunk_bytes()));
}

TEST_F(ProxyArrivalsTest, ChunksThatWouldOverrunTheQueueAreMadeLonger) {
  start_with_room(kArrivals - 1);
  EXPECT_EQ(proxy_->chunk_bytes(), 2 * kChunkBytes);
  EXPECT_NO_THROW(burst(proxy_->chunk_bytes()));

  start_with_room(kArrivals - 1);
  EXPECT_THROW(burst(kChunkBytes), std::logic_error) << "the queue is long enough for shorter chunks";
}

TEST_F(ProxyArrivalsTest, OneChunkPerNicIsTheLeast) {
  start_with_room(3 * 2 * 2);
  EXPECT_EQ(chunking({0, Operation::kDispatch, 1, kMaxTokens}).chunks, 2u);
  EXPECT_EQ(chunking({0, Operation::kCombine, 1, kMaxTokens}).chunks, 2u);
  EXPECT_NO_THROW(burst(proxy_->chunk_bytes()));
  try {
    start_with_room(3 * 2 * 2 - 1);
    FAIL();
  } catch (const ConfigurationError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("up to 12 writes"), std::string::npos) << message;
    EXPECT_NE(message.find("room for 11"), std::string::npos) << message;
  }
}

// The bound is the protocol's: whatever the shape, no NIC gets more if all sources send all they may.
TEST(MostArrivals, CountsTheBusiestNic) {
  for (const auto& [nodes, tokens, chunk_bytes, rails] :
       {std::tuple{2u, 1u, 64u, 1u}, {5u, 17u, 100u, 2u}, {8u, 128u, 4096u, 4u}, {7u, 63u, 333u, 3u}}) {
    Layout layout;
    layout.topology = {nodes, 1};
    layout.row = {.top_k = 2, .payload_bytes = 32, .scale_bytes = 8, .combine_bytes = 64};
    layout.max_tokens = tokens;
    layout.channels = 2;
    std::vector<uint64_t> arrivals(rails, 0);
    for (uint32_t source = 1; source < nodes; ++source) {
      for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
        const Chunking cut = Chunking::of(tokens, layout.row_bytes(operation), chunk_bytes, rails);
        for (uint32_t chunk = 0; chunk < cut.chunks; ++chunk) {
          arrivals[rail_of(source, 0, nodes, chunk, rails)] += layout.channels;
        }
      }
    }
    const uint64_t bound = most_arrivals(layout, chunk_bytes, rails);
    const uint64_t most = *std::max_element(arrivals.begin(), arrivals.end());
    EXPECT_LE(most, bound);
    // Rounding up to whole chunks per NIC: less than one more per source, channel and operation.
    EXPECT_LT(bound, most + (nodes - 1) * layout.channels * kOperations + 1);
  }
}

}  // namespace
}  // namespace efa_ep
