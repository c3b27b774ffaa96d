#include "fabric/link_measurement.h"

#include <algorithm>
#include <array>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"

namespace efa_ep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kPingBytes = 8;
constexpr uint32_t kWarmUpPings = 10;
constexpr uint32_t kWritesInFlightPerRail = 16;

enum Kind : uint32_t { kPing, kStream, kKinds };

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

/// One end of a measurement. Its targets are not cleared, since the other end's first ping may be there
/// already: what earlier sessions left differs by the session's part in the pattern. The first `write_bytes`
/// of its memory are the source of all its writes; behind them lies one target of that size for each rail.
class LinkEnd {
 public:
  LinkEnd(Fabric& fabric, std::span<std::byte> memory, const LinkPlan& plan)
      : fabric_(fabric), memory_(memory), plan_(plan), deadline_(Clock::now() + plan.timeout) {
    for (uint32_t i = 0; i < plan.write_bytes; ++i) memory_[i] = pattern(i, plan.starts);
  }

  /// Returns half of the median round trip.
  double ping() {
    std::vector<Clock::duration> trips;
    uint64_t pings = 0;
    for (uint32_t rail = 0; rail < fabric_.rails(); ++rail) {
      for (uint32_t i = 0; i < kWarmUpPings + plan_.round_trips; ++i) {
        const auto start = Clock::now();
        if (plan_.starts) write(rail, kPingBytes, kPing);
        ++pings;
        wait_until([&] { return arrived_[kPing] >= pings; }, "a ping");
        if (!plan_.starts) write(rail, kPingBytes, kPing);
        if (i >= kWarmUpPings) trips.push_back(Clock::now() - start);
      }
    }
    if (!plan_.starts || trips.empty()) return 0;
    const auto middle = trips.begin() + static_cast<std::ptrdiff_t>(trips.size() / 2);
    std::ranges::nth_element(trips, middle);
    return seconds(*middle) / 2;
  }

  /// Returns bytes per second in each direction.
  double stream() {
    const uint32_t rails = fabric_.rails();
    const uint64_t in_flight =
        uint64_t{rails} * std::min(kWritesInFlightPerRail, fabric_.description().send_queue_depth);
    const auto start = Clock::now();
    for (uint32_t i = 0; i < plan_.stream_writes; ++i) {
      wait_until([&] { return posted_ - completed_ < in_flight; }, "room for a write");
      write(i % rails, plan_.write_bytes, kStream);
    }
    wait_until([&] { return completed_ == posted_ && arrived_[kStream] >= plan_.stream_writes; },
               "the end of a stream");
    const double bytes = static_cast<double>(uint64_t{plan_.stream_writes} * plan_.write_bytes);
    return bytes / seconds(Clock::now() - start);
  }

  void check_bytes() const {
    const uint32_t targets = std::min(fabric_.rails(), plan_.stream_writes);
    for (uint32_t rail = 0; rail < targets; ++rail) {
      const auto target = memory_.subspan(target_offset(rail), plan_.write_bytes);
      for (uint32_t i = 0; i < plan_.write_bytes; ++i) {
        if (target[i] == pattern(i, !plan_.starts)) continue;
        throw ProtocolError("byte " + std::to_string(i) + " of " + std::to_string(plan_.write_bytes) +
                            " that rank " + std::to_string(plan_.peer) + " wrote on rail " +
                            std::to_string(rail) + " arrived wrong");
      }
    }
  }

 private:
  std::byte pattern(uint32_t position, bool of_starting_end) const {
    return static_cast<std::byte>(position * 31 + position / 256 + plan_.session * 2 + of_starting_end);
  }

  uint64_t target_offset(uint32_t rail) const { return uint64_t{plan_.write_bytes} * (1 + rail); }

  void write(uint32_t rail, uint32_t bytes, Kind kind) {
    const WriteRequest request{.peer = plan_.peer,
                               .rail = rail,
                               .local_offset = 0,
                               .remote_offset = target_offset(rail),
                               .bytes = bytes,
                               .immediate = plan_.session * kKinds + kind,
                               .context = plan_.session};
    wait_until([&] { return fabric_.post_write(request) == PostResult::kPosted; }, "room for a write");
    ++posted_;
  }

  template <typename Condition>
  void wait_until(const Condition& condition, const char* what) {
    while (!condition()) {
      if (poll()) continue;
      if (Clock::now() >= deadline_) throw silence(what);
      std::this_thread::yield();
    }
  }

  /// Whether anything happened. What belongs to other sessions, which may have failed, is dropped.
  bool poll() {
    std::array<Completion, 32> completions;
    const size_t count = fabric_.poll(completions);
    for (const Completion& completion : std::span(completions).first(count)) {
      if (completion.kind == CompletionKind::kArrival) {
        if (completion.immediate / kKinds == plan_.session) ++arrived_[completion.immediate % kKinds];
      } else if (completion.context == plan_.session) {
        if (completion.kind == CompletionKind::kError) {
          throw TransportError(
              "a write to rank " + std::to_string(plan_.peer) + " failed: " + completion.error, plan_.peer);
        }
        ++completed_;
      }
    }
    return count > 0;
  }

  RankTimeoutError silence(const std::string& what) const {
    return RankTimeoutError(
        "rank " + std::to_string(plan_.peer) + " did not answer within " +
            std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(plan_.timeout).count()) +
            " ms: waiting for " + what + "; " + std::to_string(completed_) + " of " +
            std::to_string(posted_) + " writes to it are complete, " +
            std::to_string(arrived_[kPing] + arrived_[kStream]) + " of its writes arrived",
        "link", plan_.session, {plan_.peer});
  }

  Fabric& fabric_;
  std::span<std::byte> memory_;
  const LinkPlan& plan_;
  Clock::time_point deadline_;
  uint64_t posted_ = 0;
  uint64_t completed_ = 0;
  std::array<uint64_t, kKinds> arrived_{};
};

}  // namespace

size_t link_memory_bytes(const Fabric& fabric, uint32_t write_bytes) {
  return (size_t{1} + fabric.rails()) * write_bytes;
}

LinkTimes measure_link(Fabric& fabric, std::span<std::byte> memory, const LinkPlan& plan) {
  const size_t needed = link_memory_bytes(fabric, plan.write_bytes);
  if (plan.write_bytes < kPingBytes || plan.write_bytes > fabric.description().max_write_bytes) {
    throw ConfigurationError("a link is measured with writes of " + std::to_string(kPingBytes) + " to " +
                             std::to_string(fabric.description().max_write_bytes) + " bytes, not of " +
                             std::to_string(plan.write_bytes));
  }
  if (memory.size() < needed) {
    throw ConfigurationError("measuring a link needs " + std::to_string(needed) +
                             " bytes of registered memory, but there are " + std::to_string(memory.size()));
  }
  LinkEnd end(fabric, memory, plan);
  LinkTimes times;
  times.latency_s = end.ping();
  times.bytes_per_second = end.stream();
  end.check_bytes();
  return times;
}

}  // namespace efa_ep
