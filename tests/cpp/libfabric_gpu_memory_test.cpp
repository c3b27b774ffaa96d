// Registering "GPU memory" (a memfd) by dma-buf and by address, through the transport that runs on EFA.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "errors.h"
#include "fabric/libfabric_compat.h"
#include "libfabric_testing.h"
#include "memory/arena.h"

namespace efa_ep {
namespace {

using testing::contains;
using testing::Environment;
using testing::message_of;
using testing::options_for;

constexpr size_t kBytes = size_t{4} << 20;

std::unique_ptr<LibfabricFabric> open_fabric(const std::string& provider = "efaemu") {
  LibfabricOptions options = options_for(provider, 2);
  options.device_memory = true;
  return std::make_unique<LibfabricFabric>(options);
}

DeviceRange range_of(const Arena& arena) {
  return {.base = arena.data(), .bytes = arena.bytes(), .dmabuf = arena.descriptor(), .device = 3};
}

bool knows_dmabuf() {
  open_fabric();  // opens the library
  return fi_version() >= libfabric_compat::kMrDmabufSince;
}

/// Writes from one rank's GPU memory, at `base` and a bit, to the other's, and checks the bytes.
void write_and_compare(LibfabricFabric& from, const Arena& source, LibfabricFabric& to, const Arena& target,
                       uint64_t base = 0) {
  from.connect(1, to.address());
  to.connect(0, from.address());
  constexpr uint32_t kLength = 70'000;
  const uint64_t start = base + 4096 + 16, end = base + (3 << 20);
  for (size_t i = 0; i < kLength; ++i) source.data()[start + i] = std::byte(i * 7 + i / 256);
  const WriteRequest request{
      .peer = 1, .rail = 1, .local_offset = start, .remote_offset = end, .bytes = kLength, .immediate = 5};
  std::vector<Completion> completions(8);
  bool posted = false, arrived = false;
  while (!arrived) {
    if (!posted) posted = from.post_write(request) == PostResult::kPosted;
    const size_t sent = from.poll(completions);
    for (size_t i = 0; i < sent; ++i) ASSERT_EQ(completions[i].kind, CompletionKind::kWriteDone);
    const size_t count = to.poll(completions);
    for (size_t i = 0; i < count; ++i) arrived |= completions[i].kind == CompletionKind::kArrival;
  }
  EXPECT_EQ(std::memcmp(target.data() + end, source.data() + start, kLength), 0);
  EXPECT_EQ(target.data()[end - 1], std::byte{0});
  EXPECT_EQ(target.data()[end + kLength], std::byte{0});
}

TEST(GpuMemory, IsRegisteredByDmabuf) {
  if (!knows_dmabuf()) GTEST_SKIP() << "this libfabric is older than 1.20";
  const Arena source = Arena::create(kBytes), target = Arena::create(kBytes);
  const auto from = open_fabric(), to = open_fabric();
  from->register_device_memory(range_of(source));
  to->register_device_memory(range_of(target));
  write_and_compare(*from, source, *to, target);
}

TEST(GpuMemory, IsRegisteredByAddressWhereAPeerMemoryModuleIsLoaded) {
  const Environment environment("EFAEMU_PEER_MEMORY", "1");
  const Arena source = Arena::create(kBytes), target = Arena::create(kBytes);
  const auto from = open_fabric(), to = open_fabric();
  for (const auto& [fabric, arena] : {std::pair{from.get(), &source}, std::pair{to.get(), &target}}) {
    DeviceRange range = range_of(*arena);
    range.dmabuf = -1;
    fabric->register_device_memory(range);
  }
  write_and_compare(*from, source, *to, target);
}

TEST(GpuMemory, LargerThanOneRegistrationIsCutIntoPiecesOfTheDmabuf) {
  if (!knows_dmabuf()) GTEST_SKIP() << "this libfabric is older than 1.20";
  // Memory that is not touched takes no room.
  const Arena source = Arena::create(kMaxPieceBytes + kBytes), target = Arena::create(source.bytes());
  const auto from = open_fabric(), to = open_fabric();
  from->register_device_memory(range_of(source));
  to->register_device_memory(range_of(target));
  EXPECT_EQ(FabricAddress::decode(from->address()).rails[0].keys.size(), 2u);
  write_and_compare(*from, source, *to, target, kMaxPieceBytes);
}

TEST(GpuMemory, WithoutAnyWayToRegisterItTheErrorNamesTheModules) {
  const Arena arena = Arena::create(kBytes);
  DeviceRange range = range_of(arena);
  range.dmabuf = -1;
  const std::string message =
      message_of<FabricUnavailableError>([&] { open_fabric()->register_device_memory(range); });
  EXPECT_TRUE(contains(message, "of GPU 3 by address")) << message;
  EXPECT_TRUE(contains(message, "efa_nv_peermem or nvidia-peermem")) << message;
}

TEST(GpuMemory, ADmabufOfOtherMemoryIsRefused) {
  if (!knows_dmabuf()) GTEST_SKIP() << "this libfabric is older than 1.20";
  const Arena arena = Arena::create(kBytes), other = Arena::create(kBytes);
  DeviceRange range = range_of(arena);
  range.dmabuf = other.descriptor();
  const std::string message =
      message_of<FabricUnavailableError>([&] { open_fabric()->register_device_memory(range); });
  EXPECT_TRUE(contains(message, "by dma-buf")) << message;
  EXPECT_TRUE(contains(message, "open kernel modules")) << message;
}

TEST(GpuMemory, OldLibrariesAreNamed) {
  if (knows_dmabuf()) GTEST_SKIP() << "this libfabric is 1.20 or newer";
  const Arena arena = Arena::create(kBytes);
  const std::string message =
      message_of<FabricUnavailableError>([&] { open_fabric()->register_device_memory(range_of(arena)); });
  EXPECT_TRUE(contains(message, "needs libfabric 1.20")) << message;
  EXPECT_TRUE(contains(message, "EFA_EP_LIBFABRIC")) << message;
}

TEST(GpuMemory, NeedsAFabricThatWasOpenedForIt) {
  const Arena arena = Arena::create(kBytes);
  const auto fabric = testing::make_fabric("efaemu");
  EXPECT_THROW(fabric->register_device_memory(range_of(arena)), ConfigurationError);
}

TEST(GpuMemory, IsRefusedByProvidersThatCannot) {
  const std::string message = message_of<FabricUnavailableError>([&] { open_fabric("tcp"); });
  EXPECT_TRUE(contains(message, "for GPU memory")) << message;
}

}  // namespace
}  // namespace efa_ep
