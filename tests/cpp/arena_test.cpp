#include "memory/arena.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <string>

#include "errors.h"

namespace efa_ep {
namespace {

bool is_open(int descriptor) { return fcntl(descriptor, F_GETFD) >= 0; }

uint32_t open_descriptors() {
  uint32_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

uint32_t mapped_arenas() {
  std::ifstream maps("/proc/self/maps");
  uint32_t count = 0;
  for (std::string line; std::getline(maps, line);) count += line.find("efa_ep_arena") != std::string::npos;
  return count;
}

std::set<std::string> shared_memory_files() {
  std::set<std::string> names;
  if (!std::filesystem::exists("/dev/shm")) return names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string name = entry.path().filename();
    if (name.find("efa_ep") != std::string::npos) names.insert(name);
  }
  return names;
}

TEST(Arena, IsZeroFilledAndRoundedUp) {
  for (const size_t bytes : {size_t{1}, Arena::kGranularity, Arena::kGranularity + 1}) {
    const Arena arena = Arena::create(bytes);
    EXPECT_EQ(arena.bytes(), bytes <= Arena::kGranularity ? Arena::kGranularity : 2 * Arena::kGranularity);
    EXPECT_EQ(arena.bytes(), Arena::allocated_bytes(bytes));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(arena.data()) % 4096, 0u);
    EXPECT_TRUE(
        std::all_of(arena.data(), arena.data() + arena.bytes(), [](auto b) { return b == std::byte{0}; }));
  }
}

TEST(Arena, CannotBeCutShortUnderItsReaders) {
  const Arena arena = Arena::create(4096);
  EXPECT_EQ(ftruncate(arena.descriptor(), 0), -1);
  const int unsealed = memfd_create("efa_ep_unsealed", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(unsealed, static_cast<off_t>(arena.bytes())), 0);
  EXPECT_THROW(Arena::map(unsealed, 4096), ConfigurationError);
  close(unsealed);
}

TEST(Arena, IsSharedThroughItsDescriptor) {
  const Arena arena = Arena::create(4096);
  const Arena peer = Arena::map(arena.descriptor(), 4096);
  EXPECT_NE(peer.data(), arena.data());
  EXPECT_EQ(peer.bytes(), arena.bytes());
  EXPECT_EQ(peer.descriptor(), -1);
  std::memset(arena.data(), 0x11, arena.bytes());
  EXPECT_EQ(std::memcmp(arena.data(), peer.data(), arena.bytes()), 0);
  peer.data()[peer.bytes() - 1] = std::byte{0x22};
  EXPECT_EQ(arena.data()[arena.bytes() - 1], std::byte{0x22});
}

TEST(Arena, IsSharedBetweenProcesses) {
  const Arena arena = Arena::create(4096);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const Arena peer = Arena::map(arena.descriptor(), 4096);
    peer.data()[17] = std::byte{0x33};
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(arena.data()[17], std::byte{0x33});
}

// A rank that ends first takes nothing away from its neighbours.
TEST(Arena, AMappingOutlivesItsCreator) {
  std::optional<Arena> arena(Arena::create(4096));
  const Arena peer = Arena::map(arena->descriptor(), 4096);
  arena->data()[5] = std::byte{0x44};
  arena.reset();
  EXPECT_EQ(peer.data()[5], std::byte{0x44});
}

TEST(Arena, ARegionThatIsTooSmallIsRefused) {
  const Arena arena = Arena::create(Arena::kGranularity);
  const uint32_t mapped = mapped_arenas();
  try {
    const Arena peer = Arena::map(arena.descriptor(), Arena::kGranularity + 1);
    FAIL() << "mapped " << peer.bytes() << " bytes";
  } catch (const ConfigurationError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find(std::to_string(Arena::kGranularity)), std::string::npos) << text;
    EXPECT_NE(text.find(std::to_string(2 * Arena::kGranularity)), std::string::npos) << text;
  }
  EXPECT_EQ(mapped_arenas(), mapped);
  EXPECT_TRUE(is_open(arena.descriptor()));
}

TEST(Arena, WhatTheSystemRefusesIsAConfigurationError) {
  const uint32_t open = open_descriptors();
  EXPECT_THROW(Arena::map(-1, 4096), ConfigurationError);
  try {
    Arena::create(std::numeric_limits<size_t>::max() / 4);
    FAIL();
  } catch (const ConfigurationError& error) {
    const std::string bytes = std::to_string(Arena::allocated_bytes(std::numeric_limits<size_t>::max() / 4));
    EXPECT_NE(std::string(error.what()).find(bytes), std::string::npos) << error.what();
  }
  EXPECT_EQ(open_descriptors(), open);
}

TEST(Arena, LeavesNothingBehind) {
  const uint32_t open = open_descriptors();
  const std::set<std::string> files = shared_memory_files();
  int descriptor = -1;
  {
    const Arena arena = Arena::create(3 * Arena::kGranularity);
    descriptor = arena.descriptor();
    EXPECT_TRUE(is_open(descriptor));
    EXPECT_EQ(shared_memory_files(), files);
    const Arena peer = Arena::map(descriptor, arena.bytes());
    EXPECT_GE(mapped_arenas(), 2u);
    EXPECT_EQ(open_descriptors(), open + 1);
  }
  EXPECT_FALSE(is_open(descriptor));
  EXPECT_EQ(open_descriptors(), open);
  EXPECT_EQ(mapped_arenas(), 0u);
  EXPECT_EQ(shared_memory_files(), files);
}

TEST(Arena, MovesWithItsDescriptor) {
  std::optional<Arena> first(Arena::create(4096));
  const int descriptor = first->descriptor();
  std::byte* data = first->data();
  {
    const Arena second(std::move(*first));
    first.reset();
    EXPECT_EQ(second.data(), data);
    EXPECT_EQ(second.descriptor(), descriptor);
    EXPECT_TRUE(is_open(descriptor));
    second.data()[0] = std::byte{1};
  }
  EXPECT_FALSE(is_open(descriptor));
  EXPECT_EQ(mapped_arenas(), 0u);
}

// A child that a rank starts must not keep its memory alive.
TEST(Arena, IsNotInheritedByPrograms) {
  const Arena arena = Arena::create(4096);
  EXPECT_NE(fcntl(arena.descriptor(), F_GETFD) & FD_CLOEXEC, 0);
}

}  // namespace
}  // namespace efa_ep
