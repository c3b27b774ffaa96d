// LibfabricFabric over TCP and over efaemu, which imposes EFA's rules. EFA_EP_LIBFABRIC chooses the
// libfabric; run the test once with each release that is supported.
#include "fabric/libfabric_fabric.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <future>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "errors.h"
#include "fabric/libfabric_address.h"
#include "fabric_suite.h"
#include "libfabric_testing.h"

namespace efa_ep {
namespace {

using testing::AllToAll;
using testing::contains;
using testing::Environment;
using testing::FabricCluster;
using testing::make_fabric;
using testing::message_of;

FabricCluster::Factory factory(const std::string& provider, uint32_t nics = 1) {
  return [=](uint32_t) { return make_fabric(provider, nics); };
}

class EveryProvider : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Providers, EveryProvider, ::testing::Values("tcp", "efaemu"),
                         [](const auto& info) { return std::string(info.param); });

class Traffic : public ::testing::TestWithParam<std::tuple<const char*, uint32_t, uint32_t>> {};
INSTANTIATE_TEST_SUITE_P(Providers, Traffic,
                         ::testing::Combine(::testing::Values("tcp", "efaemu"), ::testing::Values(2, 4, 8),
                                            ::testing::Values(1, 2, 3)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_ranks" +
                                  std::to_string(std::get<1>(info.param)) + "_rails" +
                                  std::to_string(std::get<2>(info.param));
                         });

TEST_P(Traffic, AllToAllDeliversEveryByteOnce) {
  const auto [provider, ranks, rails] = GetParam();
  AllToAll traffic(ranks, {0, 1, 17, 4096, 65536, 100001});
  FabricCluster cluster(ranks, traffic.memory_bytes(), factory(provider, rails));
  EXPECT_EQ(cluster.fabric(0).rails(), rails);
  traffic.run(cluster, 1000 * ranks + rails);
}

TEST_P(EveryProvider, DescribesItself) {
  const auto fabric = make_fabric(GetParam(), 2);
  const FabricDescription& description = fabric->description();
  EXPECT_TRUE(contains(description.library, "libfabric")) << description.library;
  EXPECT_FALSE(description.provider.empty());
  EXPECT_FALSE(description.fabric.empty());
  EXPECT_EQ(description.nics, (std::vector<std::string>{"lo", "lo"}));
  EXPECT_GT(description.send_queue_depth, 0U);
  EXPECT_GT(description.completion_queue_depth, description.send_queue_depth);
  EXPECT_EQ(description.max_write_bytes, kMaxWriteBytes);
}

TEST_P(EveryProvider, MemoryRegisteredAgainHasOtherKeys) {
  std::array<std::byte, 4096> memory{};
  std::set<uint64_t> keys;
  std::vector<std::unique_ptr<LibfabricFabric>> fabrics;  // side by side, in case a provider counts its keys
  for (size_t generation = 0; generation < 4; ++generation) {
    fabrics.push_back(make_fabric(GetParam()));
    fabrics.back()->register_memory(memory.data(), memory.size());
    keys.insert(FabricAddress::decode(fabrics.back()->address()).rails[0].keys[0]);
  }
  EXPECT_EQ(keys.size(), fabrics.size());
}

TEST_P(EveryProvider, QueueIsBoundedAndPollingMakesRoom) {
  const Environment no_delay("EFAEMU_DELAY_US", "0");
  FabricCluster cluster(2, 4096, factory(GetParam()));
  const uint32_t depth = cluster.fabric(0).description().send_queue_depth;
  WriteRequest request;
  request.peer = 1;
  request.bytes = 64;
  uint32_t done = 0;
  uint32_t arrived = 0;
  const auto count = [&](uint32_t, const Completion& completion) {
    ASSERT_NE(completion.kind, CompletionKind::kError) << completion.error;
    (completion.kind == CompletionKind::kArrival ? arrived : done) += 1;
  };
  cluster.write(0, request, count);  // TCP answers "again" until it is connected
  cluster.poll_until([&] { return done == 1 && arrived == 1; }, count);

  for (int round = 0; round < 3; ++round) {
    done = arrived = 0;
    uint32_t posted = 0;
    while (cluster.fabric(0).post_write(request) == PostResult::kPosted) ASSERT_LE(++posted, depth);
    EXPECT_EQ(posted, depth);
    EXPECT_EQ(cluster.fabric(0).post_write(request), PostResult::kAgain);
    cluster.poll_until([&] { return done == depth && arrived == depth; }, count);
  }
}

TEST_P(EveryProvider, ContextsAreReusedOnlyAfterCompletion) {
  const Environment shallow("EFAEMU_DEPTH", "7");  // efaemu refuses a context that is in flight
  const Environment fast("EFAEMU_DELAY_US", "0");
  FabricCluster cluster(2, 4096, factory(GetParam()));
  constexpr uint64_t kWrites = 3000;
  std::vector<uint32_t> done(kWrites);
  std::vector<uint32_t> arrived(kWrites);
  uint64_t finished = 0;
  const auto count = [&](uint32_t, const Completion& completion) {
    ASSERT_NE(completion.kind, CompletionKind::kError) << completion.error;
    ++(completion.kind == CompletionKind::kArrival ? arrived[completion.immediate]
                                                   : done[completion.context]);
    ++finished;
  };
  for (uint32_t i = 0; i < kWrites; ++i) {
    WriteRequest request;
    request.peer = 1;
    request.bytes = i % 3;
    request.immediate = i;
    request.context = i;
    cluster.write(0, request, count);
  }
  cluster.poll_until([&] { return finished == 2 * kWrites; }, count);
  EXPECT_EQ(done, std::vector<uint32_t>(kWrites, 1));
  EXPECT_EQ(arrived, std::vector<uint32_t>(kWrites, 1));
}

TEST_P(EveryProvider, LargeMemoryIsReachedEverywhere) {
  // Three pieces of registration and a bit, more than 2 GiB; only the touched pages exist.
  constexpr size_t kBytes = 3 * kPieceStride + 4096;
  static_assert(kBytes > size_t{1} << 31);
  struct Unmap {
    void operator()(std::byte* memory) const { munmap(memory, kBytes); }
  };
  const auto map = [] {
    void* memory =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    return std::unique_ptr<std::byte, Unmap>(static_cast<std::byte*>(memory));
  };
  const auto source = map();
  const auto target = map();
  const auto a = make_fabric(GetParam());
  const auto b = make_fabric(GetParam());
  a->register_memory(source.get(), kBytes);
  b->register_memory(target.get(), kBytes);
  a->connect(1, b->address());
  b->connect(0, a->address());

  constexpr uint32_t kWriteBytes = 1 << 20;
  const std::vector<uint64_t> offsets = {
      0,
      kPieceStride - 1,                  // mostly behind the first piece's stride
      kPieceStride,                      // the second piece's first byte
      kMaxPieceBytes - kWriteBytes / 2,  // across the end of the first piece
      2 * kPieceStride - kWriteBytes,
      kBytes - kWriteBytes,
  };
  std::array<Completion, 16> completions;
  for (uint32_t i = 0; i < offsets.size(); ++i) {
    WriteRequest request;
    request.peer = 1;
    request.local_offset = offsets[offsets.size() - 1 - i];
    request.remote_offset = offsets[i];
    request.bytes = kWriteBytes;
    request.immediate = i;
    for (size_t k = 0; k < kWriteBytes; k += 4096) {
      source.get()[request.local_offset + k] = testing::payload_byte(0, 1, i, k);
    }
    const auto deadline = std::chrono::steady_clock::now() + testing::kDeadline;
    bool posted = false;
    bool done = false;
    bool arrived = false;
    while (!done || !arrived) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline);
      if (!posted) posted = a->post_write(request) == PostResult::kPosted;
      for (size_t n = a->poll(completions), k = 0; k < n; ++k) {
        ASSERT_EQ(completions[k].kind, CompletionKind::kWriteDone) << completions[k].error;
        done = true;
      }
      for (size_t n = b->poll(completions), k = 0; k < n; ++k) {
        ASSERT_EQ(completions[k].immediate, i);
        arrived = true;
      }
    }
    for (size_t k = 0; k < kWriteBytes; k += 4096) {
      ASSERT_EQ(target.get()[request.remote_offset + k], testing::payload_byte(0, 1, i, k)) << "write " << i;
    }
  }
}

TEST_P(EveryProvider, RefusesWritesThatCannotBeRight) {
  FabricCluster cluster(2, 4096, factory(GetParam(), 2));
  Fabric& fabric = cluster.fabric(0);
  const auto refuses = [&](const WriteRequest& request, const std::string& part) {
    const std::string message = message_of<ConfigurationError>([&] { fabric.post_write(request); });
    EXPECT_TRUE(contains(message, part)) << message;
  };
  WriteRequest good;
  good.peer = 1;
  good.bytes = 4096;
  WriteRequest bad = good;
  bad.rail = 2;
  refuses(bad, "rail 2");
  bad = good;
  bad.peer = 2;
  refuses(bad, "rank 2 is not connected");
  bad = good;
  bad.peer = UINT32_MAX;
  refuses(bad, "is not connected");
  bad = good;
  bad.local_offset = 1;
  refuses(bad, "local offset 1");
  bad = good;
  bad.remote_offset = 1;
  refuses(bad, "remote offset 1");
  bad = good;
  bad.local_offset = UINT64_MAX - 4095;
  refuses(bad, "local offset 18446744073709547520");
  bad = good;
  bad.remote_offset = UINT64_MAX;
  bad.bytes = 0;
  refuses(bad, "remote offset 18446744073709551615");
  bad = good;
  bad.bytes = kMaxWriteBytes + 1;
  refuses(bad, "longer than");

  // The limits themselves are legal.
  bool arrived = false;
  const auto handler = [&](uint32_t, const Completion& completion) {
    arrived |= completion.kind == CompletionKind::kArrival;
  };
  good.local_offset = good.remote_offset = 4096;
  good.bytes = 0;
  cluster.write(0, good, handler);
  cluster.poll_until([&] { return arrived; }, handler);
}

TEST_P(EveryProvider, RefusesCallsInTheWrongOrder) {
  const auto fabric = make_fabric(GetParam());
  std::array<std::byte, 64> memory{};
  EXPECT_THROW(fabric->address(), ConfigurationError);
  EXPECT_THROW(fabric->register_memory(memory.data(), 0), ConfigurationError);
  fabric->register_memory(memory.data(), memory.size());
  EXPECT_THROW(fabric->register_memory(memory.data(), memory.size()), ConfigurationError);
  const auto address = fabric->address();
  EXPECT_THROW(fabric->connect(1024, address), ConfigurationError);
  fabric->connect(1023, address);
  EXPECT_THROW(fabric->connect(1023, address), ConfigurationError);
}

TEST_P(EveryProvider, WritesToAClosedEndpointFailOrWait) {
  FabricCluster cluster(2, 1 << 20, factory(GetParam()));
  uint32_t done = 0;
  uint32_t failed = 0;
  const auto handler = [&](uint32_t, const Completion& completion) {
    if (completion.kind == CompletionKind::kWriteDone) ++done;
    if (completion.kind != CompletionKind::kError) return;
    ++failed;
    EXPECT_TRUE(contains(completion.error, "(error ")) << completion.error;
    EXPECT_TRUE(contains(completion.error, "lo (rail 0)")) << completion.error;
    EXPECT_FALSE(contains(completion.error, "\n")) << completion.error;
  };
  WriteRequest request;
  request.peer = 1;
  request.bytes = 1 << 20;
  cluster.write(0, request, handler);
  cluster.poll_until([&] { return done == 1; }, handler);
  uint32_t posted = 0;
  while (posted < 32 && cluster.fabric(0).post_write(request) == PostResult::kPosted) ++posted;
  cluster.destroy(1);
  cluster.poll_until([&] { return done + failed == posted + 1; }, handler);
  EXPECT_GT(failed, 0U);
}

TEST_P(EveryProvider, RanksInThreadsShareNothing) {
  constexpr uint32_t kRanks = 4;
  constexpr uint32_t kWritesPerPeer = 100;
  constexpr uint32_t kTotal = kRanks * kWritesPerPeer;
  constexpr uint32_t kBytes = 2048;
  std::array<std::promise<std::vector<std::byte>>, kRanks> promises;
  std::vector<std::shared_future<std::vector<std::byte>>> addresses;
  for (auto& promise : promises) addresses.push_back(promise.get_future().share());
  std::atomic<uint32_t> connected{0};
  std::atomic<uint32_t> finished{0};
  const auto deadline = std::chrono::steady_clock::now() + testing::kDeadline;
  const auto wait = [deadline](const std::function<bool()>& done) {
    while (!done()) {
      if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("deadline passed");
      std::this_thread::yield();
    }
  };

  const auto run_rank = [&](uint32_t rank) {
    std::vector<std::byte> memory(2 * kRanks * kBytes);  // a source for each peer, then a target for each
    const auto fabric = make_fabric(GetParam(), 2);
    fabric->register_memory(memory.data(), memory.size());
    promises[rank].set_value(fabric->address());
    for (uint32_t peer = 0; peer < kRanks; ++peer) {
      if (addresses[peer].wait_until(deadline) != std::future_status::ready)
        throw std::runtime_error("no address");
      fabric->connect(peer, addresses[peer].get());
      for (size_t i = 0; i < kBytes; ++i) memory[peer * kBytes + i] = testing::payload_byte(rank, peer, 0, i);
    }
    ++connected;
    wait([&] { return connected == kRanks; });

    uint32_t done = 0;
    uint32_t arrived = 0;
    const auto poll = [&] {
      std::array<Completion, 8> completions;
      const size_t count = fabric->poll(completions);
      for (size_t i = 0; i < count; ++i) {
        EXPECT_NE(completions[i].kind, CompletionKind::kError) << completions[i].error;
        ++(completions[i].kind == CompletionKind::kArrival ? arrived : done);
      }
    };
    for (uint32_t i = 0; i < kTotal; ++i) {
      WriteRequest request;
      request.peer = i % kRanks;
      request.rail = i / kRanks % 2;
      request.local_offset = request.peer * kBytes;
      request.remote_offset = (kRanks + rank) * kBytes;
      request.bytes = kBytes;
      wait([&] {
        poll();
        return fabric->post_write(request) == PostResult::kPosted;
      });
    }
    wait([&] {
      poll();
      return done == kTotal && arrived == kTotal;
    });
    ++finished;
    wait([&] {  // peers may still need this rank's progress
      poll();
      return finished == kRanks;
    });
    for (uint32_t peer = 0; peer < kRanks; ++peer) {
      for (size_t i = 0; i < kBytes; ++i) {
        ASSERT_EQ(memory[(kRanks + peer) * kBytes + i], testing::payload_byte(peer, rank, 0, i));
      }
    }
  };
  std::vector<std::future<void>> ranks;
  for (uint32_t rank = 0; rank < kRanks; ++rank)
    ranks.push_back(std::async(std::launch::async, run_rank, rank));
  for (auto& rank : ranks) rank.get();
}

// ---------------------------------------------------------------------------------------------------------------
// On efaemu alone

uint32_t inversions(const char* seed) {
  const Environment environment("EFAEMU_SEED", seed);
  FabricCluster cluster(2, 1 << 16, factory("efaemu"));
  std::vector<uint32_t> order;
  const auto record = [&](uint32_t, const Completion& completion) {
    if (completion.kind == CompletionKind::kArrival) order.push_back(completion.immediate);
  };
  constexpr uint32_t kWrites = 500;
  for (uint32_t i = 0; i < kWrites; ++i) {
    WriteRequest request;
    request.peer = 1;
    request.bytes = i % 2 == 0 ? 64 : 16384;
    request.immediate = i;
    cluster.write(0, request, record);
  }
  cluster.poll_until([&] { return order.size() == kWrites; }, record);
  uint32_t count = 0;
  for (size_t i = 1; i < order.size(); ++i) count += order[i] < order[i - 1];
  return count;
}

TEST(Efaemu, WritesArriveOutOfOrder) {
  for (const char* seed : {"1", "2", "3"}) EXPECT_GT(inversions(seed), 50U) << "seed " << seed;
}

TEST(Efaemu, IsChosenByItsFabricNameAndDepth) {
  const Environment environment("EFAEMU_DEPTH", "16");
  const auto fabric = make_fabric("efaemu");
  EXPECT_EQ(fabric->description().provider, "efaemu");
  EXPECT_EQ(fabric->description().fabric, "efaemu-direct");
  EXPECT_EQ(fabric->description().send_queue_depth, 16U);
}

TEST(Efaemu, ImmediatesThatConsumeReceives) {
  const Environment environment("EFAEMU_UNSOLICITED", "0");
  const Environment shallow("EFAEMU_DEPTH", "5");
  AllToAll traffic(4, {0, 3, 4096, 70000, 12, 0, 900});
  FabricCluster cluster(4, traffic.memory_bytes(), factory("efaemu", 2));
  traffic.run(cluster, 11);
}

}  // namespace
}  // namespace efa_ep
