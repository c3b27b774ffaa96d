// measure_link() on a network that takes every liberty, over TCP, and under EFA's rules; and what it says
// when a link does not work.
#include "fabric/link_measurement.h"

#include <gtest/gtest.h>

#include <future>

#include "errors.h"
#include "fabric_suite.h"
#include "libfabric_testing.h"
#include "loopback_network.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

using testing::contains;
using testing::FabricCluster;
using testing::make_fabric;

constexpr uint32_t kWriteBytes = 10'000;

LinkPlan plan(uint32_t rank, uint32_t session, std::chrono::milliseconds timeout = kPatience) {
  return {.peer = 1 - rank,
          .starts = rank == 0,
          .session = session,
          .round_trips = 20,
          .stream_writes = 100,
          .write_bytes = kWriteBytes,
          .timeout = timeout};
}

/// Two connected ranks with memory.
struct Pair {
  explicit Pair(const LoopbackNetwork::Options& options) : network(options) {
    for (uint32_t rank : {0U, 1U}) {
      fabric(rank).connect(1 - rank, fabric(1 - rank).address());
      memory[rank].resize(link_memory_bytes(fabric(rank), kWriteBytes));
      fabric(rank).register_memory(memory[rank].data(), memory[rank].size());
    }
  }
  Fabric& fabric(uint32_t rank) { return network.endpoint(rank); }

  /// What the ends measure, or how they fail.
  std::array<std::future<LinkTimes>, 2> measure(uint32_t session, std::chrono::milliseconds timeout) {
    const auto end = [this, session, timeout](uint32_t rank) {
      return std::async(std::launch::async, [=, this] {
        return measure_link(fabric(rank), memory[rank], plan(rank, session, timeout));
      });
    };
    return {end(0), end(1)};
  }

  LoopbackNetwork network;
  std::array<std::vector<std::byte>, 2> memory;
};

TEST(LinkMeasurement, MeasuresOverAnUnorderedNetwork) {
  for (const uint32_t rails : {1U, 3U}) {
    Pair pair({.ranks = 2, .rails = rails, .seed = 7 + rails});
    for (const uint32_t session : {1U, 2U}) {
      auto [first, second] = pair.measure(session, kPatience);
      const LinkTimes times = first.get();
      EXPECT_GT(times.latency_s, 0);
      EXPECT_GT(times.bytes_per_second, 0);
      EXPECT_GT(second.get().bytes_per_second, 0);
    }
  }
}

class LinkOverLibfabric : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Providers, LinkOverLibfabric, ::testing::Values("tcp", "efaemu"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(LinkOverLibfabric, Measures) {
  FabricCluster cluster(2, 3 * kWriteBytes, [](uint32_t) { return make_fabric(GetParam(), 2); });
  const auto end = [&](uint32_t rank) {
    return measure_link(cluster.fabric(rank), {cluster.memory(rank), 3 * kWriteBytes}, plan(rank, 5));
  };
  auto second = std::async(std::launch::async, end, 1);
  EXPECT_GT(end(0).latency_s, 0);
  EXPECT_GT(second.get().bytes_per_second, 0);
}

TEST(LinkMeasurement, AFailedWriteIsATransportErrorThatNamesThePeer) {
  Pair pair({});
  pair.network.set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
  auto [first, second] = pair.measure(1, std::chrono::milliseconds(200));
  try {
    first.get();
    FAIL() << "nothing was thrown";
  } catch (const TransportError& error) {
    EXPECT_EQ(error.peer, 1);
  }
  EXPECT_THROW(second.get(), RankTimeoutError);
}

TEST(LinkMeasurement, SilenceInOneDirectionSaysWhichOneAndTheNextMeasurementWorks) {
  Pair pair({});
  pair.network.set_rule([](uint32_t source, const WriteRequest&) {
    return source == 1 ? LoopbackNetwork::Fault::kRefuse : LoopbackNetwork::Fault::kNone;
  });
  auto [first, second] = pair.measure(1, std::chrono::milliseconds(200));
  try {
    first.get();
    FAIL() << "nothing was thrown";
  } catch (const RankTimeoutError& error) {
    EXPECT_EQ(error.missing, std::vector<uint32_t>{1});
    EXPECT_TRUE(contains(error.what(), "1 of 1 writes to it are complete, 0 of its writes arrived"))
        << error.what();
  }
  EXPECT_THROW(second.get(), RankTimeoutError);

  pair.network.set_rule(nullptr);
  auto [again, other] = pair.measure(2, kPatience);
  EXPECT_GT(again.get().latency_s, 0);
  EXPECT_GT(other.get().bytes_per_second, 0);
}

/// Loses the last byte of every long write.
class TruncatingFabric final : public Fabric {
 public:
  explicit TruncatingFabric(Fabric& fabric) : fabric_(fabric) {}
  const FabricDescription& description() const override { return fabric_.description(); }
  void register_memory(std::byte* base, size_t bytes) override { fabric_.register_memory(base, bytes); }
  std::vector<std::byte> address() const override { return fabric_.address(); }
  void connect(uint32_t peer, std::span<const std::byte> address) override { fabric_.connect(peer, address); }
  PostResult post_write(const WriteRequest& request) override {
    WriteRequest shorter = request;
    if (shorter.bytes == kWriteBytes) --shorter.bytes;
    return fabric_.post_write(shorter);
  }
  size_t poll(std::span<Completion> completions) override { return fabric_.poll(completions); }

 private:
  Fabric& fabric_;
};

TEST(LinkMeasurement, WrongBytesAreAProtocolError) {
  Pair pair({});
  TruncatingFabric truncating(pair.fabric(1));
  auto second =
      std::async(std::launch::async, [&] { return measure_link(truncating, pair.memory[1], plan(1, 1)); });
  try {
    measure_link(pair.fabric(0), pair.memory[0], plan(0, 1));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const ProtocolError& error) {
    EXPECT_TRUE(contains(error.what(), "byte 9999 of 10000 that rank 1 wrote on rail 0")) << error.what();
  }
  EXPECT_GT(second.get().bytes_per_second, 0);
}

TEST(LinkMeasurement, RefusesWhatCannotBeMeasured) {
  Pair pair({});
  LinkPlan tiny = plan(0, 1);
  tiny.write_bytes = 7;
  EXPECT_THROW(measure_link(pair.fabric(0), pair.memory[0], tiny), ConfigurationError);
  LinkPlan huge = plan(0, 1);
  huge.write_bytes = 2 * kWriteBytes;
  EXPECT_THROW(measure_link(pair.fabric(0), pair.memory[0], huge), ConfigurationError);
}

}  // namespace
}  // namespace efa_ep
