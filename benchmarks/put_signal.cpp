// Prints what each signal policy leaves of the bandwidth of bare puts: on an emulated network in virtual
// time, and over libfabric between processes of this machine. See put_signal.h for what is measured.
//
//   put_signal [--full] [emulated|tcp] [NODESxTRANSFERSxKB ...]
//
// --full: also the cells that take long. Cells that are named are measured alone.
#include "put_signal.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iterator>
#include <optional>
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
  std::vector<Cell> named;  // if any, these alone
};

/// Without --full: fewer numbers of transfers, and at most 32 MiB per rank and run.
std::vector<Cell> cells(uint32_t ranks, const Plan& plan) {
  std::vector<Cell> found;
  if (!plan.named.empty()) {
    std::ranges::copy_if(plan.named, std::back_inserter(found),
                         [&](const Cell& cell) { return cell.ranks == ranks; });
    return found;
  }
  for (const uint32_t transfers : kTransfers) {
    for (const uint32_t bytes : kBytes) {
      const bool is_extra =
          transfers == 2 || transfers == 4 || transfers == 16 || uint64_t{transfers} * bytes > (32 << 20);
      if (plan.full || !is_extra) found.push_back({ranks, transfers, bytes});
    }
  }
  return found;
}

/// "4x96x1024": on 4 nodes, 96 transfers of 1 MB.
std::optional<Cell> cell_named(const std::string& name) {
  Cell cell;
  uint32_t kilobytes = 0;
  int end = 0;
  if (std::sscanf(name.c_str(), "%ux%ux%u%n", &cell.ranks, &cell.transfers, &kilobytes, &end) != 3) return {};
  const bool is_whole = static_cast<size_t>(end) == name.size();
  if (!is_whole || std::ranges::find(kNodes, cell.ranks) == kNodes.end()) return {};
  if (cell.transfers == 0 || kilobytes == 0 || kilobytes > kMaxTileBytes >> 10) return {};
  cell.bytes = kilobytes << 10;
  return cell;
}

void print_head(const char* what, std::span<const Method> methods) {
  std::printf("\n%s\n%-15s %5s %9s %8s %14s", what, "network", "nodes", "transfers", "KB each",
              "put-only GB/s");
  for (const Method& method : methods.subspan(1)) std::printf(" %12s", name_of(*method));
  std::printf("  runs  counted +-  fences per run (coupled, decoupled)\n");
}

/// Prints a line and returns what `counted` leaves.
Result print_line(const char* network, const Cell& cell, std::span<const Method> methods,
                  std::span<const Result> results) {
  const double bytes = static_cast<double>(cell.transfers) * cell.bytes;
  std::printf("%-15s %5u %9u %8u %14.3f", network, cell.ranks, cell.transfers, cell.bytes >> 10,
              bytes / results[0].seconds * 1e-9);
  Result counted;
  std::string fences;
  for (size_t i = 1; i < methods.size(); ++i) {
    std::printf(" %10.1f %%", results[i].share * 100);
    if (methods[i] == SignalPolicyKind::kCounted) counted = results[i];
    if (methods[i] == SignalPolicyKind::kCoupled || methods[i] == SignalPolicyKind::kDecoupled) {
      fences += (fences.empty() ? "" : ", ") + std::to_string(results[i].fences);
    }
  }
  std::printf("  %4u  %8.1f %%  %s\n", counted.runs, counted.share_error * 100, fences.c_str());
  std::fflush(stdout);
  return counted;
}

void print_summary(const char* network, std::vector<Result> counted) {
  if (counted.empty()) return;
  std::ranges::sort(counted, {}, &Result::share);
  const auto reached = std::ranges::count_if(counted, [](const Result& each) { return each.share >= kGoal; });
  const auto missed = std::ranges::count_if(
      counted, [](const Result& each) { return each.share + each.share_error < kGoal; });
  std::printf(
      "%s: counted leaves at least %.0f %% of put-only in %td of %zu cells, and less beyond doubt in %td; "
      "least %.1f %%, median %.1f %%\n",
      network, kGoal * 100, reached, counted.size(), missed, counted.front().share * 100,
      counted[counted.size() / 2].share * 100);
}

void run_emulated(const Plan& plan) {
  const std::string network = std::string("EMULATED ") + kProfile;
  print_head(
      "Emulated network, virtual time; the proxies' own time is not in it. nic_ordered: as if EFA had\n"
      "fences, which it has not.",
      kMethods);
  std::vector<Result> counted;
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
      "libfabric over TCP, processes on this machine's loopback, measured; medians of ratios run by\n"
      "run. Bare puts wait for acknowledgements, without which nobody knows that the bytes are there. "
      "counted\n"
      "needs none, hence more than 100 %.",
      methods);
  std::vector<Result> counted;
  for (const uint32_t nodes : kNodes) {
    const std::vector<Cell> all = cells(nodes, plan);
    if (all.empty()) continue;
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
    } else if (const auto cell = efa_ep::put_signal::cell_named(argument)) {
      plan.named.push_back(*cell);
    } else {
      std::fprintf(
          stderr,
          "usage: put_signal [--full] [emulated|tcp] [NODESxTRANSFERSxKB ...], with 2, 4 or 8 nodes\n");
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
