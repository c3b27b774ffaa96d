// The host's half of the network: takes chunks from the device's ring, posts them over all NICs, counts what
// arrives, and tells the device in one word when a pair is complete.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "clock.h"
#include "fabric/fabric.h"
#include "protocol/layout.h"
#include "proxy/arriving_pairs.h"
#include "proxy/command_ring.h"
#include "proxy/command_source.h"
#include "proxy/posting.h"
#include "proxy/tile_puts.h"
#include "proxy/wait.h"
#include "trace_buffer.h"

namespace efa_ep {

struct ProxyOptions {
  Layout layout;
  uint32_t rank = 0;
  uint64_t chunk_bytes = 256 * 1024;  ///< as in Chunking::of; see Proxy::chunk_bytes()
  uint32_t ring_commands = 4096;
  std::chrono::nanoseconds timeout = std::chrono::seconds(120);  ///< longest time a write may be refused
  const DeadlineClock* clock = &kSteadyClock;                    ///< of that time; outlives the proxy
  /// Whether the proxy's thread has a core to itself. If not, who submits does the work at once: waking
  /// another thread would only take the core away from the ranks.
  bool own_core = true;
  TilePuts* tiles = nullptr;  ///< on the same fabric; the proxy does their work too. Outlives the proxy

  /// For devices that are not CPUs. Commands beside those of try_submit(); as nothing wakes the proxy for
  /// them, its thread naps only after a long time without work. Outlives the proxy.
  CommandSource* commands = nullptr;
  /// What Layout::arrival() and Layout::completion() are offsets from, where it writes; null: the arena.
  std::byte* signals = nullptr;
  bool signals_combine_writes = false;  ///< as a GPU's PCIe window does: every signal needs a flush
  std::vector<uint32_t> cpus = {};      ///< where its thread runs; empty: anywhere
  size_t trace_spans = 0;               ///< newest spans of a trace to keep; 0: none
};

/// Totals since the start; all monotone.
struct ProxyCounters {
  uint64_t writes = 0;       ///< writes posted
  uint64_t bytes = 0;        ///< payload bytes of those writes
  uint64_t completions = 0;  ///< own writes completed
  uint64_t immediates = 0;   ///< writes of peers that arrived here
  uint64_t retries = 0;      ///< posts that the fabric answered with "again"
};

class Proxy {
 public:
  /// `arena` is this rank's registered memory, laid out by `options.layout`; it is not touched if there are
  /// `options.signals`. Both it and `fabric` outlive the proxy. `start_thread` false leaves all work to
  /// help(): for tests and measurements. Throws ConfigurationError if the fabric's completion queues cannot
  /// hold what the layout's ranks can send.
  Proxy(Fabric& fabric, std::byte* arena, const ProxyOptions& options, bool start_thread = true);
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;
  ~Proxy();

  /// Hands over a chunk. Returns false if the ring is full: help() or wait, then try again.
  bool try_submit(const Command& command);
  /// The same for a tile, if there are ProxyOptions::tiles. Throws as TilePuts::try_submit().
  bool try_put(const TilePut& put);

  /// Does a bounded piece of the proxy's work in the calling thread, unless another thread is doing it.
  /// Returns whether anything moved. A thread that waits for the network calls this instead of spinning, so
  /// that a rank needs no second core.
  bool help();

  /// While an instance lives, its thread calls help() again and again, and the proxy's own thread stays out
  /// of its way.
  class Waiting {
   public:
    explicit Waiting(Proxy* proxy) : proxy_(proxy) {
      if (proxy_ != nullptr) proxy_->waiting_.fetch_add(1, std::memory_order_relaxed);
    }
    ~Waiting() {
      if (proxy_ != nullptr) proxy_->waiting_.fetch_sub(1, std::memory_order_relaxed);
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    Proxy* proxy_;
  };

  /// Rethrows the first error, in any thread, as often as it is asked.
  void throw_if_failed() const {
    if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(failure_);
  }

  /// Waits until every submitted write is complete, tiles' too. Throws RankTimeoutError naming the ranks that
  /// keep it waiting, or what `check_interrupt` throws. It blocks a thread, so its time is always the
  /// machine's.
  void drain(std::chrono::nanoseconds timeout, const InterruptCheck& check_interrupt = nullptr);

  /// Nodes to which submitted writes are not complete yet.
  std::vector<uint32_t> unfinished_destinations();

  /// The chunk size in use: as asked for, or as much longer as the completion queues need (arrivals.h).
  uint64_t chunk_bytes() const { return chunk_bytes_; }
  uint32_t rails() const { return rails_; }
  ProxyCounters counters() const;
  /// Writes, from posting to completion, and arrivals of the past.
  std::vector<TraceSpan> trace();
  uint64_t dropped_spans();

 private:
  /// Writes to one node's rail peer, in submission order.
  struct Destination {
    std::vector<Command> queue;
    size_t next = 0;  // first of `queue` that is not posted
    uint32_t outstanding = 0;
    Refusal refusal;
    std::array<std::array<uint32_t, kOperations>, kMaxChannels> rounds{};  // whose first chunks are posted
  };
  struct AtomicCounters {
    std::atomic<uint64_t> writes{0}, bytes{0}, completions{0}, immediates{0}, retries{0};
  };

  void run();
  void wake();
  bool tiles_idle();
  bool device_ring_empty();
  std::set<uint32_t> unfinished_peers();
  bool next_command(Command& command);
  bool progress();
  bool poll();
  bool take_commands();
  bool post_queued();
  bool post_from(uint32_t node, Destination& destination);
  void on_arrival(uint32_t bits);
  void on_write_done(uint64_t context);
  void publish(size_t offset, uint64_t value) const;
  void pin_thread();
  void fail(std::exception_ptr error);
  WriteRequest request_of(uint32_t node, const Command& command) const;
  void trace_write(const WriteRequest& request, Destination& destination, uint64_t begin_ns);
  // Only the holder of work_ writes counters; readers may be anywhere.
  static void add(std::atomic<uint64_t>& counter, uint64_t amount) {
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
  }

  Fabric& fabric_;
  const ProxyOptions options_;
  std::byte* const signals_;
  const uint32_t node_;
  const uint32_t rails_;
  const uint64_t chunk_bytes_;

  CommandRing ring_;
  std::mutex work_;  // held by whoever does the proxy's work
  std::vector<Destination> destinations_;
  size_t queued_ = 0;
  uint32_t outstanding_ = 0;  // of all destinations
  ArrivingPairs arriving_;
  std::vector<uint64_t> completed_;  // writes, by context without the node
  std::vector<Completion> completions_;
  AtomicCounters counters_;
  TraceBuffer trace_;

  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;

  std::atomic<uint32_t> waiting_{0};
  std::atomic<bool> parked_{false};
  std::atomic<bool> stop_{false};
  std::mutex park_;
  std::condition_variable unpark_;
  std::thread thread_;
};

}  // namespace efa_ep
