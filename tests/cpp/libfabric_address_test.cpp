// The bytes with which ranks introduce themselves, when they are not what this rank can talk to.
#include "fabric/libfabric_address.h"

#include <gtest/gtest.h>

#include <array>
#include <random>
#include <string>
#include <vector>

#include "errors.h"
#include "libfabric_testing.h"

namespace efa_ep {
namespace {

using testing::contains;
using testing::make_fabric;
using testing::message_of;

class EveryProvider : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Providers, EveryProvider, ::testing::Values("tcp", "efaemu"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(EveryProvider, RefusesAddressesOfOthers) {
  const auto fabric = make_fabric(GetParam());
  const auto two_rails = make_fabric(GetParam(), 2);
  std::array<std::byte, 64> memory{};
  fabric->register_memory(memory.data(), memory.size());
  two_rails->register_memory(memory.data(), memory.size());
  const auto refuses = [&](const std::vector<std::byte>& address, const std::string& part) {
    const std::string message = message_of<ProtocolError>([&] { fabric->connect(1, address); });
    EXPECT_TRUE(contains(message, part)) << message;
  };
  refuses(two_rails->address(), "number of NICs 2, this rank has 1");

  const std::vector<std::byte> own = fabric->address();
  for (size_t length = 0; length < own.size(); ++length) {
    refuses({own.begin(), own.begin() + static_cast<ptrdiff_t>(length)}, "truncated");
  }
  std::vector<std::byte> longer = own;
  longer.push_back(std::byte{0});
  refuses(longer, "1 bytes too long");

  FabricAddress address = FabricAddress::decode(own);
  address.provider = "carrier pigeon";
  refuses(address.encode(), "provider \"carrier pigeon\"");
  address = FabricAddress::decode(own);
  address.library_minor += 1;
  refuses(address.encode(), "libfabric ");
  address = FabricAddress::decode(own);
  address.fabric = "efa-direct";
  refuses(address.encode(), "fabric \"efa-direct\"");
  address = FabricAddress::decode(own);
  address.rails[0].endpoint_name.pop_back();
  refuses(address.encode(), "length of endpoint name");
  address = FabricAddress::decode(own);
  address.rails[0].endpoint_name[0] ^= std::byte{0xff};
  refuses(address.encode(), "address family");
  address = FabricAddress::decode(own);
  address.memory_bytes = kPieceStride + 1;  // needs one key more than there is
  refuses(address.encode(), "truncated");
  fabric->connect(1, own);
}

TEST_P(EveryProvider, SurvivesRandomAddresses) {
  const auto fabric = make_fabric(GetParam());
  std::array<std::byte, 64> memory{};
  fabric->register_memory(memory.data(), memory.size());
  const std::vector<std::byte> own = fabric->address();
  const uint64_t seed = 7;
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  uint32_t rank = 0;
  for (int i = 0; i < 20000 && rank < 1000; ++i) {
    std::vector<std::byte> bytes = own;
    for (uint64_t changes = 1 + random() % 4; changes > 0; --changes) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    if (random() % 4 == 0) bytes.resize(random() % (bytes.size() + 8));
    try {
      fabric->connect(rank, bytes);
      ++rank;  // a changed port or key cannot be told from a right one
    } catch (const ProtocolError&) {
    }
  }
}

}  // namespace
}  // namespace efa_ep
