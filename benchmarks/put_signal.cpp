// Prints what each signal policy leaves of the bandwidth of bare puts: on an emulated network in virtual
// time, and over libfabric between processes of this machine. See put_signal.h for what is measured.
//
//   put_signal [--full] [emulated|tcp]
#include "put_signal.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace efa_ep::put_signal {
namespace {

constexpr double kGoal = 0.95;
constexpr const char* kProfile = "p5en";
constexpr std::array<Method, 5> kMethods = {kPutOnly, SignalPolicyKind::kCounted, SignalPolicyKind::kCoupled,
                                            SignalPolicyKind::kDecoupled, SignalPolicyKind::kNicOrdered};
constexpr std::array<uint32_t, 3> kNodes = {2, 4, 8};
constexpr std::array<uint32_t, 8> kTransfers = {1, 2, 4, 8, 16, 32, 96, 128};
constexpr std::array<uint32_t, 5> kBytes = {4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20};

struct Plan {
  bool full = false;
  bool emulated = true;
  bool tcp = true;
};

/// Without --full: fewer numbers of transfers, and at most 32 MiB per rank and run.
std::vector<Cell> cells(uint32_t ranks, const Plan& plan) {
  std::vector<Cell> found;
  for (const uint32_t transfers : kTransfers) {
    for (const uint32_t bytes : kBytes) {
      const bool is_extra =
          transfers == 2 || transfers == 4 || transfers == 16 || uint64_t{transfers} * bytes > (32 << 20);
      if (plan.full || !is_extra) found.push_back({ranks, transfers, bytes});
    }
  }
  return found;
}

void print_head(const char* what, std::span<const Method> methods) {
  std::printf("\n%s\n%-15s %5s %9s %8s %14s", what, "network", "nodes", "transfers", "KB each",
              "put-only GB/s");
  for (const Method& method : methods.subspan(1)) std::printf(" %12s", name_of(*method));
  std::printf("  fences per run (coupled, decoupled)\n");
}

/// Prints a line and returns what `counted` leaves.
double print_line(const char* network, const Cell& cell, std::span<const Method> methods,
                  std::span<const Result> results) {
  const double put_only = results[0].seconds;
  const double bytes = static_cast<double>(cell.transfers) * cell.bytes;
  std::printf("%-15s %5u %9u %8u %14.3f", network, cell.ranks, cell.transfers, cell.bytes >> 10,
              bytes / put_only * 1e-9);
  double counted = 0;
  std::string fences;
  for (size_t i = 1; i < methods.size(); ++i) {
    const double fraction = put_only / results[i].seconds;
    std::printf(" %10.1f %%", fraction * 100);
    if (methods[i] == SignalPolicyKind::kCounted) counted = fraction;
    if (methods[i] == SignalPolicyKind::kCoupled || methods[i] == SignalPolicyKind::kDecoupled) {
      fences += (fences.empty() ? "" : ", ") + std::to_string(results[i].counters.fences / results[i].runs);
    }
  }
  std::printf("  %s\n", fences.c_str());
  std::fflush(stdout);
  return counted;
}

void print_summary(const char* network, std::vector<double> counted) {
  std::ranges::sort(counted);
  const auto reached = std::ranges::count_if(counted, [](double each) { return each >= kGoal; });
  std::printf(
      "%s: counted leaves at least %.0f %% of put-only in %td of %zu cells; least %.1f %%, median %.1f %%\n",
      network, kGoal * 100, reached, counted.size(), counted.front() * 100,
      counted[counted.size() / 2] * 100);
}

void run_emulated(const Plan& plan) {
  const std::string network = std::string("EMULATED ") + kProfile;
  print_head(
      "Emulated network, virtual time; the proxies' own time is not in it. nic_ordered: as if EFA had\n"
      "fences, which it has not.",
      kMethods);
  std::vector<double> counted;
  for (const uint32_t nodes : kNodes) {
    for (const Cell& cell : cells(nodes, plan)) {
      const std::vector<Result> results = measure_emulated(kProfile, true, cell, kMethods);
      counted.push_back(print_line(network.c_str(), cell, kMethods, results));
    }
  }
  print_summary(network.c_str(), counted);
  std::printf(
      "Published for 96 x 4 KB on 8 nodes (arXiv 2605.00686): coupled 2 %%, both techniques of Perseus 74 "
      "%%\n");
}

void run_tcp(const Plan& plan) {
  const auto methods = std::span(kMethods).first(4);  // TCP grants no fence
  print_head(
      "libfabric over TCP, processes on this machine's loopback, measured; median of 9 to 31 runs. Bare "
      "puts\n"
      "wait for acknowledgements, without which nobody knows that the bytes are there. counted needs none,\n"
      "hence more than 100 %.",
      methods);
  std::vector<double> counted;
  for (const uint32_t nodes : kNodes) {
    const std::vector<Cell> all = cells(nodes, plan);
    const auto results = measure_processes("tcp", all, methods);
    for (size_t i = 0; i < all.size(); ++i) {
      counted.push_back(print_line("tcp", all[i], methods, results[i]));
    }
  }
  print_summary("tcp", counted);
}

}  // namespace
}  // namespace efa_ep::put_signal

int main(int argc, char** argv) {
  efa_ep::put_signal::Plan plan;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--full") {
      plan.full = true;
    } else if (argument == "emulated") {
      plan.tcp = false;
    } else if (argument == "tcp") {
      plan.emulated = false;
    } else {
      std::fprintf(stderr, "usage: put_signal [--full] [emulated|tcp]\n");
      return 2;
    }
  }
  try {
    if (plan.emulated) efa_ep::put_signal::run_emulated(plan);
    if (plan.tcp) efa_ep::put_signal::run_tcp(plan);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "put_signal: %s\n", error.what());
    return 1;
  }
}
