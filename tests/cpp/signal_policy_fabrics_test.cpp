// Signal policies on the other fabrics: libfabric over TCP and under EFA's rules, and an emulated network
// that is worse than EFA and has fences added.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "errors.h"
#include "fabric/emulated_fabric.h"
#include "fabric_suite.h"
#include "forwarding_fabric.h"
#include "libfabric_testing.h"
#include "proxy/signal_policy.h"
#include "self_advancing_fabric.h"
#include "test_environment.h"

namespace efa_ep {
namespace {

using ::efa_ep::testing::AllToAll;
using ::efa_ep::testing::contains;
using ::efa_ep::testing::FabricCluster;
using ::efa_ep::testing::message_of;
using ::testing::Combine;
using ::testing::Values;
using ::testing::ValuesIn;

class PolicyOnEmulation : public ::testing::TestWithParam<SignalPolicyKind> {};
INSTANTIATE_TEST_SUITE_P(All, PolicyOnEmulation, ValuesIn(kSignalPolicies),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(PolicyOnEmulation, SignalsComeAfterTheirBytes) {
  for (uint64_t turn = 0; turn < amount(6, 200) && !HasFailure(); ++turn) {
    EmulatedProfile profile = emulated_profile("hostile");
    profile.honours_fence = true;
    EmulatedNetwork network({.profile = profile, .seed = test_seed(2) + turn, .check_sources = true});
    AllToAll traffic(3, {0, 1, 17, 4096, 500});
    std::vector<std::unique_ptr<Fabric>> fabrics;
    FabricCluster cluster(3, traffic.memory_bytes(), [&](uint32_t rank) {
      fabrics.push_back(std::make_unique<SelfAdvancingFabric>(network, rank));
      return SignalPolicy::create(GetParam(), *fabrics.back(), network.clock());
    });
    traffic.run(cluster, test_seed(2) + turn);
    EXPECT_EQ(network.counters(0).changed_sources, 0u);
  }
}

TEST(EmulatedFences, AreRefusedUnlessTheProfileHasThem) {
  EmulatedNetwork network({.profile = emulated_profile("p5en")});
  EmulatedFabric fabric(network, 0);
  EXPECT_FALSE(fabric.description().honours_fence) << "EFA has no fences";
  std::vector<std::byte> memory(64);
  fabric.register_memory(memory.data(), memory.size());
  fabric.connect(0, fabric.address());
  const std::string message = message_of<ConfigurationError>([&] { fabric.post_write({.fence = true}); });
  EXPECT_TRUE(contains(message, "p5en")) << message;
}

class PolicyOnLibfabric : public ::testing::TestWithParam<std::tuple<const char*, SignalPolicyKind>> {};
INSTANTIATE_TEST_SUITE_P(Providers, PolicyOnLibfabric,
                         Combine(Values("tcp", "efaemu"),
                                 Values(SignalPolicyKind::kCounted, SignalPolicyKind::kCoupled,
                                        SignalPolicyKind::kDecoupled)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)) + "_" +
                                  name_of(std::get<1>(info.param));
                         });

/// A policy and its fabric in one, as a factory has to return it.
struct OwnedPolicy {
  std::unique_ptr<Fabric> fabric;
  std::unique_ptr<SignalPolicy> policy;
};
class Owning final : OwnedPolicy, public ForwardingFabric {
 public:
  Owning(std::unique_ptr<Fabric> owned, SignalPolicyKind kind)
      : OwnedPolicy{std::move(owned), nullptr},
        ForwardingFabric(*(policy = SignalPolicy::create(kind, *fabric))) {}
};

TEST_P(PolicyOnLibfabric, SignalsComeAfterTheirBytes) {
  const auto [provider, kind] = GetParam();
  constexpr uint32_t kRanks = 4;
  AllToAll traffic(kRanks, {0, 1, 4096, 100'001});
  FabricCluster cluster(kRanks, traffic.memory_bytes(), [&](uint32_t) {
    return std::make_unique<Owning>(testing::make_fabric(provider, 2), kind);
  });
  traffic.run(cluster, 5);
}

TEST(PolicyOnLibfabric, FencesAreAskedForAndRefusedByName) {
  for (const char* provider : {"tcp", "efaemu"}) {
    LibfabricOptions options = testing::options_for(provider);
    options.fence = true;
    LibfabricFabric fabric(options);
    EXPECT_FALSE(fabric.description().honours_fence);
    const std::string message =
        message_of<ConfigurationError>([&] { SignalPolicy::create(SignalPolicyKind::kNicOrdered, fabric); });
    EXPECT_TRUE(contains(message, fabric.description().provider)) << message;

    std::vector<std::byte> memory(64);
    fabric.register_memory(memory.data(), memory.size());
    fabric.connect(0, fabric.address());
    WriteRequest fenced;
    fenced.fence = true;
    const std::string refusal = message_of<ConfigurationError>([&] { fabric.post_write(fenced); });
    EXPECT_TRUE(contains(refusal, "FI_FENCE")) << refusal;
  }
}

}  // namespace
}  // namespace efa_ep
