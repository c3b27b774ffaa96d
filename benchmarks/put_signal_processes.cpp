#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <numeric>
#include <string>

#include "errors.h"
#include "fabric/libfabric_fabric.h"
#include "put_signal.h"

namespace efa_ep::put_signal {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kMaxProcesses = 16;
constexpr uint32_t kMaxResults = 1024;
constexpr size_t kMaxAddress = 1024;
constexpr uint32_t kWarmUps = 2;
constexpr uint32_t kLeastRuns = 15;
constexpr uint32_t kMostRuns = 201;
constexpr double kMostSeconds = 8;  // of a cell that is not exact by then
constexpr double kExact = 0.01;
constexpr auto kPatience = std::chrono::seconds(120);

double quantile(std::vector<double> values, double fraction) {
  const auto place =
      values.begin() + static_cast<std::ptrdiff_t>(fraction * static_cast<double>(values.size()));
  std::ranges::nth_element(values, place);
  return *place;
}

/// The notch of a box plot (McGill, Tukey, Larsen, Variations of Box Plots, 1978): medians that are further
/// apart differ.
double error_of_median(const std::vector<double>& values) {
  const double spread = quantile(values, 0.75) - quantile(values, 0.25);
  return 1.57 * spread / std::sqrt(static_cast<double>(values.size()));
}

/// What the processes share. Everything but the barrier is written before a barrier and read after it.
struct Shared {
  std::atomic<uint32_t> arrived{0};
  std::atomic<uint32_t> passed{0};
  std::array<std::array<std::byte, kMaxAddress>, kMaxProcesses> addresses;
  std::array<size_t, kMaxProcesses> address_bytes;
  std::array<int64_t, kMaxProcesses> began_ns, ended_ns;
  std::array<Result, kMaxResults> results;
};

class Process {
 public:
  Process(Shared& shared, const char* provider, uint32_t rank, std::span<const Cell> cells)
      : shared_(shared), rank_(rank), ranks_(cells.front().ranks) {
    uint32_t largest = 0;
    for (const Cell& cell : cells) largest = std::max(largest, cell.bytes);
    memory_.resize(memory_bytes(largest));
    LibfabricOptions options;
    options.provider = provider;
    options.interface = "lo";
    options.peers = ranks_;
    fabric_ = std::make_unique<LibfabricFabric>(options);
    fabric_->register_memory(memory_.data(), memory_.size());
    const std::vector<std::byte> own = fabric_->address();
    if (own.size() > kMaxAddress) throw ConfigurationError("a fabric address is longer than expected");
    std::ranges::copy(own, shared_.addresses[rank].begin());
    shared_.address_bytes[rank] = own.size();
    barrier(nullptr);
    for (uint32_t peer = 0; peer < ranks_; ++peer) {
      if (peer == rank) continue;
      fabric_->connect(peer, std::span(shared_.addresses[peer]).first(shared_.address_bytes[peer]));
    }
    barrier(nullptr);
  }

  void measure(const Cell& cell, std::span<const Method> methods, Result* results) {
    std::vector<std::vector<double>> seconds(methods.size()), shares(methods.size());
    std::vector<uint64_t> fences(methods.size());
    for (uint32_t turn = 0; turn < kWarmUps || !is_enough(seconds, shares); ++turn) {
      std::vector<double> took(methods.size());
      // Another is first each time, so that none always comes after the same.
      for (size_t i = 0; i < methods.size(); ++i) {
        const size_t method = (turn + i) % methods.size();
        Rank rank(*fabric_, methods[method], cell, rank_, kSteadyClock);
        took[method] = run_once(rank);
        fences[method] = rank.counters().fences;
      }
      if (turn < kWarmUps) continue;
      for (size_t i = 0; i < methods.size(); ++i) {
        seconds[i].push_back(took[i]);
        shares[i].push_back(took[0] / took[i]);
      }
    }
    if (rank_ != 0) return;
    for (size_t i = 0; i < methods.size(); ++i) {
      results[i] = {.seconds = quantile(seconds[i], 0.5),
                    .share = quantile(shares[i], 0.5),
                    .share_error = error_of_median(shares[i]),
                    .runs = static_cast<uint32_t>(shares[i].size()),
                    .fences = fences[i]};
    }
  }

 private:
  /// All ranks come to the same answer, from the same times.
  static bool is_enough(const std::vector<std::vector<double>>& seconds,
                        const std::vector<std::vector<double>>& shares) {
    if (shares.front().size() < kLeastRuns) return false;
    if (shares.front().size() == kMostRuns) return true;
    double total = 0;
    for (const std::vector<double>& each : seconds) total = std::accumulate(each.begin(), each.end(), total);
    return total > kMostSeconds ||
           std::ranges::all_of(shares, [](const auto& each) { return error_of_median(each) <= kExact; });
  }

  /// From the first rank's start to the last one's end.
  double run_once(Rank& rank) {
    barrier(&rank);
    shared_.began_ns[rank_] = Clock::now().time_since_epoch().count();
    rank.begin();
    const auto deadline = Clock::now() + kPatience;
    while (!rank.finished()) step(rank, deadline);
    shared_.ended_ns[rank_] = Clock::now().time_since_epoch().count();
    barrier(&rank);
    const int64_t began = *std::min_element(shared_.began_ns.begin(), shared_.began_ns.begin() + ranks_);
    const int64_t ended = *std::max_element(shared_.ended_ns.begin(), shared_.ended_ns.begin() + ranks_);
    barrier(&rank);
    return static_cast<double>(ended - began) * 1e-9;
  }

  static void step(Rank& rank, Clock::time_point deadline) {
    if (rank.step()) return;
    sched_yield();
    if (Clock::now() > deadline) throw TransportError("a run did not end in 120 s", -1);
  }

  /// A rank that waits here goes on serving its peers: TCP moves only while it is polled.
  void barrier(Rank* rank) {
    const uint32_t generation = shared_.passed.load(std::memory_order_acquire);
    if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == ranks_) {
      shared_.arrived.store(0, std::memory_order_relaxed);
      shared_.passed.store(generation + 1, std::memory_order_release);
      return;
    }
    const auto deadline = Clock::now() + kPatience;
    while (shared_.passed.load(std::memory_order_acquire) == generation) {
      if (rank != nullptr) {
        step(*rank, deadline);
      } else {
        sched_yield();
        if (Clock::now() > deadline) throw TransportError("a process did not come in 120 s", -1);
      }
    }
  }

  Shared& shared_;
  const uint32_t rank_;
  const uint32_t ranks_;
  std::vector<std::byte> memory_;
  std::unique_ptr<LibfabricFabric> fabric_;
};

/// The life of a process of the benchmark; returns its exit status.
int live(Shared& shared, const char* provider, uint32_t rank, std::span<const Cell> cells,
         std::span<const Method> methods) {
  try {
    Process process(shared, provider, rank, cells);
    for (size_t i = 0; i < cells.size(); ++i) {
      process.measure(cells[i], methods, &shared.results[i * methods.size()]);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "put_signal: rank %u: %s\n", rank, error.what());
    return 1;
  }
}

}  // namespace

std::vector<std::vector<Result>> measure_processes(const char* provider, std::span<const Cell> cells,
                                                   std::span<const Method> methods) {
  const uint32_t ranks = cells.front().ranks;
  if (ranks > kMaxProcesses || cells.size() * methods.size() > kMaxResults) {
    throw ConfigurationError("too many processes or cells");
  }
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* shared = new (memory) Shared;
  const pid_t parent = getpid();
  std::vector<pid_t> children;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      _exit(getppid() == parent ? live(*shared, provider, rank, cells, methods) : 1);
    }
    children.push_back(child);
  }
  bool failed = false;
  for (const pid_t child : children) {
    int status = 0;
    failed |= child < 0 || waitpid(child, &status, 0) != child || status != 0;
  }
  std::vector<std::vector<Result>> results;
  for (size_t i = 0; i < cells.size(); ++i) {
    const auto first = shared->results.begin() + static_cast<std::ptrdiff_t>(i * methods.size());
    results.emplace_back(first, first + static_cast<std::ptrdiff_t>(methods.size()));
  }
  munmap(memory, sizeof(Shared));
  if (failed) throw TransportError("a process of the benchmark failed", -1);
  return results;
}

}  // namespace efa_ep::put_signal
