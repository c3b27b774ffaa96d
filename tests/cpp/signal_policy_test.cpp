// What every signal policy promises: an immediate that arrives means that its write's bytes are there, on a
// network that takes every liberty; what each costs in fences and signals; and that the checks notice a
// policy that orders nothing.
#include "proxy/signal_policy.h"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fabric_suite.h"
#include "forwarding_fabric.h"
#include "libfabric_testing.h"
#include "loopback_network.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {
namespace {

using ::efa_ep::testing::AllToAll;
using ::efa_ep::testing::contains;
using ::efa_ep::testing::FabricCluster;
using ::efa_ep::testing::message_of;
using ::testing::Message;
using ::testing::Values;
using ::testing::ValuesIn;

/// Says that it honours fences, and lets `change` have its way with each write.
class Bent final : public ForwardingFabric {
 public:
  using Change = std::function<void(WriteRequest&)>;
  Bent(Fabric& fabric, Change change)
      : ForwardingFabric(fabric), description_(fabric.description()), change_(std::move(change)) {
    description_.honours_fence = true;
  }
  const FabricDescription& description() const override { return description_; }
  PostResult post_write(const WriteRequest& request) override {
    WriteRequest changed = request;
    change_(changed);
    return fabric_.post_write(changed);
  }

 private:
  FabricDescription description_;
  const Change change_;
};

/// Every rank writes to every rank, through `wrap` around the network's endpoints.
using Wrap = std::function<std::unique_ptr<Fabric>(Fabric&)>;
void exchange(uint32_t ranks, uint32_t rails, bool honours_fence, uint64_t seed, const Wrap& wrap) {
  LoopbackNetwork network({.ranks = ranks,
                           .rails = rails,
                           .seed = seed,
                           .honours_fence = honours_fence,
                           .early_completions = true});
  AllToAll traffic(ranks, {0, 1, 17, 4096, 500});
  FabricCluster cluster(ranks, traffic.memory_bytes(),
                        [&](uint32_t rank) { return wrap(network.endpoint(rank)); });
  traffic.run(cluster, seed);
}

class EveryPolicy : public ::testing::TestWithParam<SignalPolicyKind> {};
INSTANTIATE_TEST_SUITE_P(All, EveryPolicy, ValuesIn(kSignalPolicies),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(EveryPolicy, SignalsComeAfterTheirBytes) {
  for (uint64_t turn = 0; turn < amount(30, 1000) && !HasFailure(); ++turn) {
    const auto turn_ranks = static_cast<uint32_t>(2 + turn % 3);
    const auto turn_rails = static_cast<uint32_t>(1 + turn % 2);
    exchange(turn_ranks, turn_rails, /*honours_fence=*/true, test_seed(1) + turn,
             [&](Fabric& fabric) { return SignalPolicy::create(GetParam(), fabric); });
  }
}

// What the first test is worth: policies that lack one thing each must fail it.
class Broken : public ::testing::TestWithParam<std::tuple<const char*, SignalPolicyKind>> {};
INSTANTIATE_TEST_SUITE_P(OneThingEach, Broken,
                         Values(std::tuple("ignores_the_fence", SignalPolicyKind::kNicOrdered),
                                std::tuple("takes_sent_for_delivered", SignalPolicyKind::kCoupled),
                                std::tuple("takes_sent_for_delivered", SignalPolicyKind::kDecoupled)),
                         [](const auto& info) {
                           return std::string(name_of(std::get<1>(info.param))) + "_that_" +
                                  std::get<0>(info.param);
                         });

TEST_P(Broken, IsCaught) {
  std::vector<std::unique_ptr<Fabric>> bent;
  ::testing::TestPartResultArray results;
  {
    const ::testing::ScopedFakeTestPartResultReporter reporter(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
    for (uint64_t seed = 1; seed <= 30; ++seed) {
      exchange(3, 2, /*honours_fence=*/false, seed, [&](Fabric& fabric) {
        bent.push_back(
            std::make_unique<Bent>(fabric, [](WriteRequest& request) { request.delivered = false; }));
        return SignalPolicy::create(std::get<1>(GetParam()), *bent.back());
      });
    }
  }
  EXPECT_GT(results.size(), 0) << "30 runs went well";
}

/// Sends the signal at once, and waits for nothing.
class NoWait final : public ForwardingFabric {
 public:
  using ForwardingFabric::ForwardingFabric;
  PostResult post_write(const WriteRequest& request) override {
    WriteRequest part = request;
    part.notify = false;
    part.context = kData;
    while (fabric_.post_write(part) == PostResult::kAgain) return PostResult::kAgain;
    part = request;
    part.bytes = 0;
    if (fabric_.post_write(part) == PostResult::kAgain) late_.push_back(part);
    return PostResult::kPosted;
  }
  size_t poll(std::span<Completion> completions) override {
    const size_t count = fabric_.poll(completions);
    while (!late_.empty() && fabric_.post_write(late_.back()) == PostResult::kPosted) late_.pop_back();
    const auto end = std::remove_if(completions.begin(), completions.begin() + count, [](const auto& each) {
      return each.kind == CompletionKind::kWriteDone && each.context == kData;
    });
    return static_cast<size_t>(end - completions.begin());
  }

 private:
  static constexpr uint64_t kData = ~uint64_t{0};
  std::vector<WriteRequest> late_;
};

TEST(BrokenPolicy, WithoutAnyWaitIsCaught) {
  ::testing::TestPartResultArray results;
  {
    const ::testing::ScopedFakeTestPartResultReporter reporter(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
    exchange(3, 1, true, 1, [](Fabric& fabric) { return std::make_unique<NoWait>(fabric); });
  }
  EXPECT_GT(results.size(), 0);
}

// ---- what a policy costs, seen from rank 0 of three

class PolicyCost : public ::testing::Test {
 protected:
  /// The test's own time.
  struct Clock final : DeadlineClock {
    TimePoint now() const override { return time; }
    TimePoint time;
  };

  void start(SignalPolicyKind kind) {
    policy_.reset();
    memory_.clear();
    network_ = std::make_unique<LoopbackNetwork>(LoopbackNetwork::Options{
        .ranks = 3, .send_queue_depth = 1000, .seed = test_seed(3), .honours_fence = true});
    for (uint32_t rank = 0; rank < 3; ++rank) {
      memory_.emplace_back(4096);
      network_->endpoint(rank).register_memory(memory_[rank].data(), memory_[rank].bytes());
      for (uint32_t peer = 0; peer < 3; ++peer) {
        network_->endpoint(rank).connect(peer, network_->endpoint(peer).address());
      }
    }
    policy_ = SignalPolicy::create(kind, network_->endpoint(0), clock_);
  }
  PostResult post(uint32_t peer, Ends ends, uint32_t bytes = 64) {
    WriteRequest request;
    request.peer = peer;
    request.bytes = bytes;
    request.context = ++posted_;
    request.ends = ends;
    return policy_->post_write(request);
  }
  /// Polls until the writes that were posted are complete, and returns how many that were.
  uint64_t settle() {
    const Patience patience;
    std::vector<Completion> completions(8);
    for (uint64_t done = 0;; patience.check()) {
      const size_t count = policy_->poll(completions);
      for (size_t i = 0; i < count; ++i) EXPECT_EQ(completions[i].kind, CompletionKind::kWriteDone);
      done += count;
      if (done == posted_) return done;
    }
  }

  Clock clock_;
  std::unique_ptr<LoopbackNetwork> network_;
  std::vector<TestMemory> memory_;
  std::unique_ptr<SignalPolicy> policy_;
  uint64_t posted_ = 0;
};

TEST_F(PolicyCost, CoupledPostsNothingBetweenATransferAndItsSignal) {
  start(SignalPolicyKind::kCoupled);
  network_->hold_completions(true);
  EXPECT_EQ(post(1, Ends::kNothing), PostResult::kPosted);
  EXPECT_EQ(post(1, Ends::kTransfer), PostResult::kPosted) << "a transfer may have several writes";
  EXPECT_EQ(post(1, Ends::kGroup), PostResult::kAgain);
  EXPECT_EQ(post(2, Ends::kGroup), PostResult::kAgain) << "another destination has to wait, too";
  posted_ -= 2;
  clock_.time += std::chrono::microseconds(17);
  EXPECT_EQ(policy_->counters().signals, 0u);
  network_->hold_completions(false);
  settle();
  const SignalCounters counters = policy_->counters();
  EXPECT_EQ(counters.fences, 1u);
  EXPECT_EQ(counters.waits, 1u);
  EXPECT_EQ(counters.signals, 2u);
  EXPECT_EQ(counters.stall_ns, 17'000u);
  EXPECT_EQ(post(2, Ends::kGroup), PostResult::kPosted);
}

TEST_F(PolicyCost, DecoupledWaitsOncePerGroupAndHoldsNobodyUp) {
  start(SignalPolicyKind::kDecoupled);
  network_->hold_completions(true);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(post(1, Ends::kTransfer), PostResult::kPosted);
  EXPECT_EQ(policy_->counters().fences, 0u);
  EXPECT_EQ(post(1, Ends::kGroup), PostResult::kPosted);
  EXPECT_EQ(post(2, Ends::kGroup), PostResult::kPosted);
  EXPECT_EQ(post(1, Ends::kGroup), PostResult::kPosted) << "a group behind one that is waited for";
  clock_.time += std::chrono::microseconds(17);
  EXPECT_EQ(policy_->counters().signals, 0u);
  network_->hold_completions(false);
  settle();
  const SignalCounters counters = policy_->counters();
  EXPECT_EQ(counters.fences, 3u);
  EXPECT_EQ(counters.waits, 3u);
  EXPECT_EQ(counters.signals, 10u);
  EXPECT_EQ(counters.stall_ns, 0u);
}

TEST_F(PolicyCost, NicOrderedNeverWaits) {
  start(SignalPolicyKind::kNicOrdered);
  network_->hold_completions(true);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(post(1, Ends::kTransfer), PostResult::kPosted);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(post(1, Ends::kGroup), PostResult::kPosted);
  EXPECT_EQ(policy_->counters().signals, 8u) << "before anything is complete";
  network_->hold_completions(false);
  settle();
  EXPECT_EQ(policy_->counters().fences, 3u) << "one per group";
  EXPECT_EQ(policy_->counters().waits, 0u);
  EXPECT_EQ(network_->traffic(0).fenced, 3u);
}

TEST_F(PolicyCost, CountedIsOneRequestPerWrite) {
  start(SignalPolicyKind::kCounted);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(post(1, Ends::kGroup), PostResult::kPosted);
  settle();
  const SignalCounters counters = policy_->counters();
  EXPECT_EQ(counters.fences + counters.waits + counters.signals + counters.stall_ns, 0u);
  EXPECT_EQ(network_->traffic(0).writes, 5u);
  EXPECT_EQ(network_->traffic(0).silent, 0u);
}

// A write without bytes has nothing to wait for, and a silent one has no signal.
TEST_F(PolicyCost, OnlyWritesWithBytesAndSignalCostAFence) {
  for (const SignalPolicyKind kind : kSignalPolicies) {
    start(kind);
    posted_ = 0;
    EXPECT_EQ(post(1, Ends::kGroup, 0), PostResult::kPosted);
    WriteRequest silent;
    silent.peer = 2;
    silent.bytes = 64;
    silent.notify = false;
    EXPECT_EQ(policy_->post_write(silent), PostResult::kPosted);
    ++posted_;
    settle();
    EXPECT_EQ(policy_->counters().fences, 0u) << name_of(kind);
    EXPECT_EQ(network_->traffic(0).writes, 2u) << name_of(kind);
    EXPECT_EQ(network_->traffic(0).silent, 1u) << name_of(kind);
  }
}

TEST_F(PolicyCost, AFailedWriteIsReportedAndNeverSignalled) {
  for (const SignalPolicyKind kind : {SignalPolicyKind::kCoupled, SignalPolicyKind::kDecoupled}) {
    start(kind);
    network_->set_rule([](uint32_t, const WriteRequest&) { return LoopbackNetwork::Fault::kFail; });
    ASSERT_EQ(post(1, Ends::kGroup), PostResult::kPosted);
    const Patience patience;
    std::vector<Completion> completions(8);
    while (policy_->poll(completions) == 0) patience.check();
    EXPECT_EQ(completions[0].kind, CompletionKind::kError);
    EXPECT_EQ(completions[0].context, posted_);
    EXPECT_EQ(policy_->counters().signals, 0u);
  }
}

// ---- choosing

TEST(SignalPolicyChoice, NicOrderedNeedsFencesAndSaysSo) {
  LoopbackNetwork network({.honours_fence = false});
  const std::string message = message_of<ConfigurationError>(
      [&] { SignalPolicy::create(SignalPolicyKind::kNicOrdered, network.endpoint(0)); });
  for (const char* part : {"nic_ordered", "loopback", "EFA_EP_SIGNAL_POLICY=counted"}) {
    EXPECT_TRUE(contains(message, part)) << message;
  }
}

TEST(SignalPolicyChoice, NamesAreThoseOfTheSetting) {
  for (const SignalPolicyKind kind : kSignalPolicies) EXPECT_EQ(signal_policy_named(name_of(kind)), kind);
  const std::string message = message_of<ConfigurationError>([] { signal_policy_named("fast"); });
  for (const char* part : {"fast", "counted", "coupled", "decoupled", "nic_ordered"}) {
    EXPECT_TRUE(contains(message, part)) << message;
  }
}

}  // namespace
}  // namespace efa_ep
