// How many writes the proxy can handle, on a network that costs next to nothing: commands go into the ring,
// the proxy posts them and takes their completions, all in one thread, hence on one core.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "fabric/null_fabric.h"
#include "protocol/immediate.h"
#include "proxy/proxy.h"

namespace efa_ep {
namespace {

constexpr uint32_t kCommandsPerSample = 200'000;
constexpr int kSamples = 25;
constexpr double kGoalPerSecond = 5e6;

struct Shape {
  uint32_t nodes;
  uint32_t rails;
  uint32_t burst;  // commands submitted before the proxy works: chunks that a device hands over at once
};

/// Returns nanoseconds per write, one value per sample, sorted.
std::vector<double> measure(const Shape& shape) {
  ProxyOptions options;
  options.layout.topology = {.world = shape.nodes, .ranks_per_node = 1};
  options.layout.row = {.top_k = 8, .payload_bytes = 14336, .scale_bytes = 0, .combine_bytes = 14336};
  options.layout.max_tokens = 1;
  NullFabric fabric(shape.rails, 1024);
  std::vector<std::byte> arena(options.layout.total_bytes() + kWordStride);
  void* base = arena.data();
  size_t space = arena.size();
  std::align(kWordStride, options.layout.total_bytes(), base, space);
  Proxy proxy(fabric, static_cast<std::byte*>(base), options, /*start_thread=*/false);

  const Immediate immediate{.round_tag = 1, .source_node = 0, .first = true, .value = 1};
  std::vector<double> samples;
  uint32_t destination = 0;
  for (int sample = 0; sample < kSamples; ++sample) {
    const uint64_t before = proxy.counters().completions;
    const auto started = std::chrono::steady_clock::now();
    for (uint32_t submitted = 0; submitted < kCommandsPerSample; submitted += shape.burst) {
      for (uint32_t i = 0; i < shape.burst; ++i) {
        destination = destination + 1 < shape.nodes ? destination + 1 : 1;
        const Command command{.immediate = immediate.encode(),
                              .destination_node = static_cast<uint16_t>(destination),
                              .rows = 1};
        while (!proxy.try_submit(command)) proxy.help();
      }
      while (proxy.counters().completions - before < submitted + shape.burst) proxy.help();
    }
    const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - started;
    proxy.throw_if_failed();
    samples.push_back(elapsed.count() / kCommandsPerSample);
  }
  std::sort(samples.begin(), samples.end());
  return samples;
}

void run() {
  std::printf("Proxy on a null network, one thread: ring, post, completion. %d samples of %u writes.\n",
              kSamples, kCommandsPerSample);
  std::printf("%5s %5s %5s  %14s %14s  %s\n", "nodes", "NICs", "burst", "median ns/write", "worst ns/write",
              "M writes/s (median)");
  double slowest = 0;
  for (const Shape& shape :
       {Shape{2, 1, 1}, Shape{2, 1, 16}, Shape{8, 2, 16}, Shape{8, 4, 64}, Shape{16, 2, 64}}) {
    const std::vector<double> samples = measure(shape);
    const double median = samples[samples.size() / 2];
    slowest = std::max(slowest, median);
    std::printf("%5u %5u %5u  %14.1f %14.1f  %.2f\n", shape.nodes, shape.rails, shape.burst, median,
                samples.back(), 1e3 / median);
  }
  std::printf("%s in every row: at least %.0f M writes/s on one core; worst %.2f\n",
              1e9 / slowest >= kGoalPerSecond ? "met" : "NOT met", kGoalPerSecond / 1e6, 1e3 / slowest);
}

}  // namespace
}  // namespace efa_ep

int main() {
  try {
    efa_ep::run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "proxy_rate: %s\n", error.what());
    return 1;
  }
}
