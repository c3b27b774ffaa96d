// The death of a peer process. This binary is also the peer: started as `... --victim PROVIDER FD` it
// exchanges addresses over the socket FD and writes to the other side until it is killed.
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "fabric/libfabric_fabric.h"
#include "libfabric_testing.h"

namespace efa_ep {
namespace {

constexpr size_t kMemoryBytes = size_t{1} << 20;
constexpr std::chrono::seconds kDeadline{300};

/// A fabric connected to the process at the other end of a socket.
struct Rank {
  Rank(const std::string& provider, int socket)
      : memory(kMemoryBytes), fabric(testing::options_for(provider)) {
    fabric.register_memory(memory.data(), memory.size());
    fabric.connect(0, exchange(socket, fabric.address()));
    exchange(socket, {});  // nobody writes before both have connected
  }

  static std::vector<std::byte> exchange(int socket, const std::vector<std::byte>& mine) {
    if (send(socket, mine.data(), mine.size(), MSG_EOR | MSG_NOSIGNAL) < 0)
      throw std::runtime_error("send failed");
    std::vector<std::byte> theirs(4096);
    const ssize_t length = recv(socket, theirs.data(), theirs.size(), 0);
    if (length < 0) throw std::runtime_error("recv failed");
    theirs.resize(length);
    return theirs;
  }

  /// Posts one write of all the memory; returns whether there was room.
  bool write() {
    WriteRequest request;
    request.bytes = kMemoryBytes;
    return fabric.post_write(request) == PostResult::kPosted;
  }

  std::vector<std::byte> memory;
  LibfabricFabric fabric;
};

/// What became of the writes of one rank.
struct Outcome {
  uint64_t posted = 0;
  uint64_t finished = 0;
  uint64_t errors = 0;
  uint64_t arrivals = 0;

  void count(const Completion& completion) {
    if (completion.kind == CompletionKind::kArrival) {
      ++arrivals;
      return;
    }
    ++finished;
    if (completion.kind != CompletionKind::kError) return;
    ++errors;
    EXPECT_NE(completion.error.find("(error "), std::string::npos) << completion.error;
  }
  void write(Rank& rank) {
    if (rank.write()) ++posted;
  }
  void poll(Rank& rank) {
    std::array<Completion, 16> completions;
    const size_t seen = rank.fabric.poll(completions);
    for (size_t i = 0; i < seen; ++i) count(completions[i]);
    if (seen == 0) std::this_thread::yield();
  }
};

class PeerDeath : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Providers, PeerDeath, ::testing::Values("tcp", "efaemu"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(PeerDeath, WritesFailOrWaitAndTheProcessLives) {
  std::array<int, 2> sockets;
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets.data()), 0);
  const std::string number = std::to_string(sockets[1]);
  std::array<const char*, 5> arguments = {"victim", "--victim", GetParam(), number.c_str(), nullptr};
  pid_t victim = 0;
  ASSERT_EQ(
      posix_spawn(&victim, "/proc/self/exe", nullptr, nullptr, const_cast<char**>(arguments.data()), environ),
      0);
  close(sockets[1]);
  Rank rank(GetParam(), sockets[0]);
  close(sockets[0]);

  Outcome outcome;
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  while (outcome.arrivals < 20 || outcome.finished < 20) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    outcome.write(rank);
    outcome.poll(rank);
  }
  EXPECT_EQ(outcome.errors, 0U);
  kill(victim, SIGKILL);
  int status = 0;
  ASSERT_EQ(waitpid(victim, &status, 0), victim);
  EXPECT_TRUE(WIFSIGNALED(status));

  // Writes were in flight both ways and more are tried. Every write that was taken must end, the lost ones
  // with an error; that a write of the peer broke off may be thrown.
  int tries = 0;
  while (outcome.errors == 0 || outcome.finished < outcome.posted) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << outcome.errors << " errors, " << outcome.finished
                                                          << " of " << outcome.posted << " writes finished";
    try {
      if (++tries < 1000) outcome.write(rank);
      outcome.poll(rank);
    } catch (const TransportError& error) {
      EXPECT_NE(std::string(error.what()).find("a peer's write to this rank failed"), std::string::npos)
          << error.what();
    }
  }
  EXPECT_EQ(outcome.finished, outcome.posted);
}

int run_victim(const std::string& provider, int socket) {
  Rank rank(provider, socket);
  Outcome outcome;
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  while (std::chrono::steady_clock::now() < deadline) {
    outcome.write(rank);
    outcome.poll(rank);
  }
  return 1;  // nobody killed it
}

}  // namespace
}  // namespace efa_ep

int main(int argc, char** argv) {
  if (argc == 4 && std::strcmp(argv[1], "--victim") == 0)
    return efa_ep::run_victim(argv[2], std::atoi(argv[3]));
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
