// What copying received rows past the caches costs and saves, until the experts have read them: they read
// their weights before, and these pass through the caches, too.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <span>
#include <vector>

#include "cpu/row_copy.h"

namespace efa_ep {
namespace {

constexpr size_t kRowBytes = 14336;  // 7168 bf16
constexpr size_t kMegabyte = 1'000'000;
constexpr int kRanks = 2;  // they share memory and last-level cache
constexpr int kTurns = 40;

using Words = std::vector<uint64_t>;  // their allocation is at a multiple of 16
using Clock = std::chrono::steady_clock;

Words megabytes(size_t count) { return Words(count * kMegabyte / sizeof(uint64_t), 1); }

uint64_t read(std::span<const uint64_t> words) { return std::reduce(words.begin(), words.end()); }

double microseconds(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

struct Times {
  std::vector<double> copied, read;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

void measure(size_t row_megabytes, size_t weight_megabytes, bool print) {
  const size_t rows = row_megabytes * kMegabyte / kRowBytes;
  const Words other = megabytes(64), weights = megabytes(weight_megabytes), from = megabytes(row_megabytes);
  Words to = megabytes(row_megabytes);
  Times times[2];
  volatile uint64_t keep = 0;  // so that the compiler reads
  for (int turn = 0; turn < kTurns; ++turn) {
    for (const Caching caching : {Caching::kThrough, Caching::kPast}) {
      keep = keep + read(other);  // the rest of the layer
      const auto begin = Clock::now();
      for (size_t row = 0; row < rows; ++row) {
        copy_row(reinterpret_cast<std::byte*>(to.data()) + row * kRowBytes,
                 reinterpret_cast<const std::byte*>(from.data()) + row * kRowBytes, kRowBytes, caching);
      }
      Times& own = times[static_cast<size_t>(caching)];
      own.copied.push_back(microseconds(begin));
      keep = keep + read(weights) + read(to);
      own.read.push_back(microseconds(begin));
    }
  }
  if (!print) return;
  std::printf("%4zu MB %8zu MB %12.0f %8.0f %8.2f %16.0f %8.0f %8.2f\n", row_megabytes, weight_megabytes,
              median(times[0].copied), median(times[1].copied),
              median(times[0].copied) / median(times[1].copied), median(times[0].read), median(times[1].read),
              median(times[0].read) / median(times[1].read));
}

}  // namespace
}  // namespace efa_ep

int main() {
  std::printf("%d processes; median microseconds through the caches, past them, and the ratio\n",
              efa_ep::kRanks);
  std::printf("%7s %11s %12s %8s %8s %16s %8s %8s\n", "rows", "weights", "copied", "past", "x", "and read",
              "past", "x");
  std::fflush(stdout);
  for (int rank = 0; rank < efa_ep::kRanks; ++rank) {
    const pid_t child = fork();
    if (child < 0) return 1;
    if (child > 0) continue;
    for (const size_t weights : {0, 8, 32}) {
      for (const size_t rows : {1, 2, 4, 8, 16, 32}) efa_ep::measure(rows, weights, rank == 0);
    }
    return 0;
  }
  int failures = 0;
  for (int status = 0; wait(&status) > 0;) failures += status != 0;
  return failures;
}
