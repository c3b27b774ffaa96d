// Which provider and NICs a rank gets, and what the errors say.
#include "fabric/libfabric_provider.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "libfabric_testing.h"

namespace efa_ep {
namespace {

using testing::contains;
using testing::Environment;
using testing::make_fabric;
using testing::message_of;
using testing::options_for;

TEST(ProviderChoice, OffersRxCqDataOnlyIfTheDeviceNeedsIt) {
  const LibfabricOptions options = options_for("efaemu");
  const LibfabricLibrary& library = LibfabricLibrary::open(options.library);
  EXPECT_FALSE(choose_provider(library, options).nics[0]->mode & FI_RX_CQ_DATA);
  const Environment environment("EFAEMU_UNSOLICITED", "0");
  EXPECT_TRUE(choose_provider(library, options).nics[0]->mode & FI_RX_CQ_DATA);
}

TEST(ProviderChoice, EfaNicsAreShared) {
  const auto share = [](size_t available, uint32_t nics, uint32_t local_rank, uint32_t ranks_on_host) {
    LibfabricOptions options;
    options.nics = nics;
    options.local_rank = local_rank;
    options.ranks_on_host = ranks_on_host;
    return share_of_nics(available, options);
  };
  using Share = std::vector<size_t>;
  EXPECT_EQ(share(32, 0, 0, 8), (Share{0, 1, 2, 3}));  // p5
  EXPECT_EQ(share(32, 0, 7, 8), (Share{28, 29, 30, 31}));
  EXPECT_EQ(share(8, 0, 5, 8), (Share{5}));   // p6-b200
  EXPECT_EQ(share(4, 0, 5, 8), (Share{2}));   // fewer NICs than ranks
  EXPECT_EQ(share(16, 1, 3, 8), (Share{6}));  // one of the two that are near
  EXPECT_EQ(share(16, 4, 7, 8), (Share{14, 15, 0, 1}));
  EXPECT_EQ(share(3, 0, 0, 1), (Share{0, 1, 2}));
  const std::string message = message_of<ConfigurationError>([&] { share(4, 5, 0, 1); });
  EXPECT_TRUE(contains(message, "is 5, but this host has 4 EFA NICs")) << message;
}

TEST(ProviderChoice, NicsAreFoundByTheirRdmaDevices) {
  const auto near = [](const std::vector<std::string>& rdma_devices, uint32_t nics = 0) {
    LibfabricOptions options;
    options.rdma_devices = rdma_devices;
    options.nics = nics;
    return near_nics({"rdmap79s0-rdm", "rdmap80s0-rdm", "rdmap7s0-rdm", "efa_0"}, options);
  };
  using Indices = std::vector<size_t>;
  EXPECT_EQ(near({"rdmap80s0", "rdmap79s0"}), (Indices{0, 1}));
  EXPECT_EQ(near({"rdmap80s0", "rdmap79s0"}, 1), (Indices{0}));
  EXPECT_EQ(near({"rdmap7s0"}), (Indices{2}));
  EXPECT_EQ(near({"efa_0", "absent"}), (Indices{3}));
  EXPECT_EQ(near({}), (Indices{}));
  EXPECT_EQ(near({"absent"}, 2), (Indices{}));
  const std::string message = message_of<ConfigurationError>([&] { near({"rdmap80s0", "rdmap79s0"}, 4); });
  EXPECT_TRUE(contains(message, "is 4, but only 2 of this host's EFA NICs")) << message;
}

TEST(ProviderChoice, TcpOfOldLibrariesIsCalledNet) {
  const LibfabricLibrary& library = LibfabricLibrary::open(options_for("tcp").library);
  const auto fabric = make_fabric("tcp");
  if (library.major() == 1 && library.minor() < 18) {
    EXPECT_EQ(fabric->description().provider, "net");
    EXPECT_TRUE(contains(fabric->description().library, "\"tcp\" is named \"net\""));
  } else {
    EXPECT_EQ(fabric->description().provider, "tcp");
  }
}

TEST(ProviderChoice, UnknownNamesAreListed) {
  const std::string message = message_of<ConfigurationError>([] { make_fabric("pigeon"); });
  EXPECT_TRUE(contains(message, "\"pigeon\"")) << message;
  EXPECT_TRUE(contains(message, "tcp")) << message;

  LibfabricOptions options = options_for("tcp");
  options.interface = "nosuch0";
  const std::string interfaces = message_of<ConfigurationError>([&] { LibfabricFabric fabric(options); });
  EXPECT_TRUE(contains(interfaces, "\"nosuch0\"")) << interfaces;
  EXPECT_TRUE(contains(interfaces, "lo")) << interfaces;
}

// Both open, and would fail or hang later.
TEST(ProviderChoice, ProvidersThatBreakTheContractAreRefusedByName) {
  for (const auto& [provider, reason] :
       {std::pair{"sockets", "own write"}, std::pair{"shm", "a process that has died"}}) {
    const std::string message = message_of<ConfigurationError>([&] { make_fabric(provider); });
    for (const char* part : {provider, reason, "Use auto, or tcp"}) {
      EXPECT_TRUE(contains(message, part)) << message;
    }
  }
}

TEST(ProviderChoice, BadCountsAreRefused) {
  LibfabricOptions options = options_for("tcp");
  options.nics = 65;
  EXPECT_THROW(LibfabricFabric{options}, ConfigurationError);
  options = options_for("tcp");
  options.ranks_on_host = 0;
  EXPECT_THROW(LibfabricFabric{options}, ConfigurationError);
  options.ranks_on_host = 2;
  options.local_rank = 2;
  EXPECT_THROW(LibfabricFabric{options}, ConfigurationError);
}

/// A /sys/class as on a machine with these (device, driver) pairs.
class FakeSysfs {
 public:
  using Devices = std::vector<std::pair<std::string, std::string>>;
  explicit FakeSysfs(const Devices& devices) {
    std::string name = ::testing::TempDir() + "sysfs-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    root_ = name;
    for (const auto& [device, driver] : devices) {
      std::filesystem::create_directories(root_ / "drivers" / driver);
      std::filesystem::create_directories(root_ / device / "device");
      std::filesystem::create_symlink(root_ / "drivers" / driver, root_ / device / "device" / "driver");
    }
  }
  FakeSysfs(const FakeSysfs&) = delete;
  ~FakeSysfs() { std::filesystem::remove_all(root_); }
  const std::filesystem::path& root() const { return root_; }

 private:
  std::filesystem::path root_;
};

TEST(ProviderChoice, FindsEfaDevicesInSysfs) {
  const FakeSysfs sysfs({{"infiniband/rdmap0s31", "efa"},
                         {"infiniband/mlx5_0", "mlx5_core"},
                         {"infiniband_verbs/uverbs0", "efa"},
                         {"net/eth0", "ena"}});
  EXPECT_EQ(efa_devices(sysfs.root()), (std::vector<std::string>{"rdmap0s31", "uverbs0"}));
  EXPECT_EQ(efa_devices("/nonexistent"), std::vector<std::string>{});
}

TEST(ProviderChoice, AutoFallsBackToTcpOnlyWithoutEfaDevices) {
  ASSERT_EQ(efa_devices("/sys/class"), std::vector<std::string>{})
      << "run this test on a machine without EFA";
  LibfabricOptions options = options_for("auto");
  const LibfabricFabric fabric(options);
  EXPECT_TRUE(fabric.description().provider == "tcp" || fabric.description().provider == "net");

  const FakeSysfs sysfs(FakeSysfs::Devices{{"infiniband/rdmap0s31", "efa"}});
  options.sysfs_class = sysfs.root();
  const std::string message =
      message_of<FabricUnavailableError>([&] { LibfabricFabric unavailable(options); });
  for (const char* part : {"rdmap0s31", "efa-direct: ", "efa: ", "EFA_EP_PROVIDER=tcp"}) {
    EXPECT_TRUE(contains(message, part)) << message;
  }
  options.provider = "tcp";
  EXPECT_NO_THROW(LibfabricFabric{options});
}

TEST(ProviderChoice, EfaByNameDoesNotFallBack) {
  ASSERT_EQ(efa_devices("/sys/class"), std::vector<std::string>{})
      << "run this test on a machine without EFA";
  for (const char* name : {"efa", "efa-direct"}) EXPECT_THROW(make_fabric(name), Error) << name;
}

}  // namespace
}  // namespace efa_ep
