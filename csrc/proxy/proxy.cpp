#include "proxy/proxy.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <set>
#include <string>
#include <system_error>
#include <utility>

#include "errors.h"
#include "protocol/arrivals.h"
#include "protocol/round.h"

namespace efa_ep {
namespace {

constexpr size_t kPollBatch = 64;
// Commands taken per piece of work: bounds how long help() keeps a device thread.
constexpr uint32_t kCommandBatch = 64;
// Empty rounds of work before the proxy's thread sleeps instead of yielding. Nobody wakes it for commands
// that a device leaves in memory; half a second or so without any is a pause in serving.
constexpr uint32_t kYieldsBeforeParking = 64;
constexpr uint32_t kYieldsBeforeParkingWithDevice = 1 << 20;
constexpr auto kParkTime = std::chrono::microseconds(100);

// The context of a write says whose it is; no table of writes in flight is needed. Of a traced one, the bits
// from 32 to 62 are the number of its span; bit 63 is that of tile puts.
constexpr uint32_t kSpanShift = 32;
constexpr uint64_t kSpanBits = 0x7FFFFFFF;
constexpr uint64_t context_of(uint32_t node, const Immediate& immediate) {
  return uint64_t{node} << 2 | static_cast<uint64_t>(immediate.operation) << 1 | immediate.channel;
}
constexpr uint32_t context_node(uint64_t context) { return static_cast<uint32_t>(context) >> 2; }
constexpr Operation context_operation(uint64_t context) { return static_cast<Operation>(context >> 1 & 1); }
constexpr uint32_t context_channel(uint64_t context) { return context & 1; }
constexpr uint32_t context_pair(uint64_t context) { return context & 3; }

// Sends what the CPU combines for a write-combined mapping on its way.
void flush_combined_writes() {
#if defined(__x86_64__)
  _mm_sfence();
#else
  __sync_synchronize();
#endif
}

// The chunk size that was asked for, doubled until the completion queues hold all that can arrive. It depends
// on nothing that ranks could disagree about: connected fabrics have equal room.
uint64_t chunk_bytes_that_fit(const ProxyOptions& options, const FabricDescription& fabric) {
  const Layout& layout = options.layout;
  const auto rails = static_cast<uint32_t>(fabric.nics.size());
  const uint64_t whole_pair = layout.max_tokens * std::max(layout.dispatch_row(), layout.combine_row());
  uint64_t room = fabric.completion_queue_depth > fabric.send_queue_depth
                      ? fabric.completion_queue_depth - fabric.send_queue_depth
                      : 0;
  if (options.tiles != nullptr) room /= 2;  // tile puts take the other half
  uint64_t chunk_bytes = options.chunk_bytes;
  while (most_arrivals(layout, chunk_bytes, rails) > room && chunk_bytes < whole_pair) chunk_bytes *= 2;
  const uint64_t arrivals = most_arrivals(layout, chunk_bytes, rails);
  if (arrivals > room) {
    throw ConfigurationError(
        "up to " + std::to_string(arrivals) +
        " writes can be on their way to one NIC, but its completion queue has room for " +
        std::to_string(room) +
        " beside own writes, and longer chunks do not help; use fewer channels, or more "
        "ranks per node (EFA_EP_RANKS_PER_NODE)");
  }
  return chunk_bytes;
}

}  // namespace

Proxy::Proxy(Fabric& fabric, std::byte* arena, const ProxyOptions& options, bool start_thread)
    : fabric_(fabric),
      options_(options),
      signals_(options.signals != nullptr ? options.signals : arena),
      node_(options.layout.topology.node_of(options.rank)),
      rails_(fabric.rails()),
      chunk_bytes_(chunk_bytes_that_fit(options, fabric.description())),
      ring_(options.ring_commands),
      destinations_(options.layout.topology.nodes()),
      arriving_(options_.layout, node_, chunk_bytes_, rails_),
      completed_(size_t{kMaxChannels} * kOperations),
      completions_(kPollBatch),
      trace_(options.trace_spans) {
  if (start_thread) thread_ = std::thread(&Proxy::run, this);
}

Proxy::~Proxy() {
  stop_.store(true);
  {
    const std::lock_guard lock(park_);
    unpark_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

bool Proxy::try_submit(const Command& command) {
  if (!ring_.try_push(command)) return false;
  if (options_.own_core) {
    wake();
  } else {
    help();
  }
  return true;
}

bool Proxy::try_put(const TilePut& put) {
  if (!options_.tiles->try_submit(put)) return false;
  wake();
  return true;
}

void Proxy::wake() {
  if (!parked_.load(std::memory_order_relaxed)) return;
  const std::lock_guard lock(park_);
  unpark_.notify_one();
}

bool Proxy::help() {
  const std::unique_lock lock(work_, std::try_to_lock);
  if (!lock.owns_lock() || failed_.load(std::memory_order_relaxed)) return false;
  try {
    return progress();
  } catch (...) {  // whatever it is, the device's thread rethrows it
    fail(std::current_exception());
    return false;
  }
}

void Proxy::drain(std::chrono::nanoseconds timeout, const InterruptCheck& check_interrupt) {
  const Waiting waiting(this);
  const auto start = kSteadyClock.now();
  auto last_interrupt_check = start;
  while (true) {
    if (help()) continue;
    throw_if_failed();
    // The rings first: another thread may move a command from there to its destination at any time.
    const bool ring_empty = ring_.empty() && device_ring_empty();
    const std::set<uint32_t> unfinished = unfinished_peers();
    if (ring_empty && unfinished.empty() && tiles_idle()) return;
    const std::vector<uint32_t> ranks(unfinished.begin(), unfinished.end());
    const auto now = kSteadyClock.now();
    const auto describe = [&] {
      const double seconds = std::chrono::duration<double>(now - start).count();
      return "drain on rank " + std::to_string(options_.rank) + " waited " + std::to_string(seconds) +
             " s for " +
             (ranks.empty() ? "its proxy to take commands"
                            : "the completion of writes to " + rank_names(ranks));
    };
    if (now - start > timeout) throw RankTimeoutError(describe(), "drain", 0, ranks);
    if (check_interrupt && now - last_interrupt_check > kInterruptCheckTime) {
      last_interrupt_check = now;
      check_interrupt({"drain", 0, describe});
    }
    sched_yield();
  }
}

std::vector<uint32_t> Proxy::unfinished_destinations() {
  const std::lock_guard lock(work_);
  std::vector<uint32_t> nodes;
  for (uint32_t node = 0; node < destinations_.size(); ++node) {
    const Destination& destination = destinations_[node];
    if (destination.outstanding > 0 || destination.next < destination.queue.size()) nodes.push_back(node);
  }
  return nodes;
}

std::set<uint32_t> Proxy::unfinished_peers() {
  std::set<uint32_t> ranks;
  for (const uint32_t node : unfinished_destinations()) {
    ranks.insert(options_.layout.topology.rail_peer(options_.rank, node));
  }
  const std::lock_guard lock(work_);
  if (options_.tiles != nullptr) ranks.merge(options_.tiles->unfinished_peers());
  return ranks;
}

bool Proxy::device_ring_empty() {
  const std::lock_guard lock(work_);
  return options_.commands == nullptr || options_.commands->empty();
}

bool Proxy::tiles_idle() {
  const std::lock_guard lock(work_);
  return options_.tiles == nullptr || options_.tiles->idle();
}

ProxyCounters Proxy::counters() const {
  const auto read = [](const std::atomic<uint64_t>& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  return {read(counters_.writes), read(counters_.bytes), read(counters_.completions),
          read(counters_.immediates), read(counters_.retries)};
}

// The proxy's own thread. It yields while there is work, and naps when there is none: arrivals that come
// during a nap wait for its end, or for a device thread that waits for them and helps.
void Proxy::run() {
  prctl(PR_SET_NAME, "efa_ep_proxy");
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns; the default of 50 us would double the nap
  if (!options_.cpus.empty()) pin_thread();
  const uint32_t patience =
      options_.commands == nullptr ? kYieldsBeforeParking : kYieldsBeforeParkingWithDevice;
  uint32_t empty = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    const bool others_work = waiting_.load(std::memory_order_relaxed) > 0;
    if (!others_work && help()) {
      empty = 0;
      continue;
    }
    if (!others_work && ++empty < patience) {
      sched_yield();
      continue;
    }
    std::unique_lock lock(park_);
    parked_.store(true, std::memory_order_relaxed);
    unpark_.wait_for(lock, kParkTime);
    parked_.store(false, std::memory_order_relaxed);
    empty = 0;
  }
}

void Proxy::pin_thread() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  for (const uint32_t cpu : options_.cpus) CPU_SET(cpu, &cpus);
  const int result = pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);
  if (result == 0) return;
  const std::lock_guard lock(work_);
  std::string names;
  for (const uint32_t cpu : options_.cpus) names += (names.empty() ? "" : ", ") + std::to_string(cpu);
  fail(std::make_exception_ptr(ConfigurationError("the proxy's thread cannot run on the CPUs near its GPU, " +
                                                  names + " (" + std::generic_category().message(result) +
                                                  "); give the process CPUs of that NUMA node")));
}

bool Proxy::progress() {
  const bool arrived = poll();
  const bool taken = take_commands();
  const bool posted = queued_ > 0 && post_queued();
  const bool tiles_moved = options_.tiles != nullptr && options_.tiles->work();
  return arrived || taken || posted || tiles_moved;
}

bool Proxy::poll() {
  const size_t count = fabric_.poll(completions_);
  for (size_t i = 0; i < count; ++i) {
    const Completion& completion = completions_[i];
    if (options_.tiles != nullptr && TilePuts::owns(completion)) {
      options_.tiles->complete(completion);
      continue;
    }
    switch (completion.kind) {
      case CompletionKind::kArrival:
        on_arrival(completion.immediate);
        break;
      case CompletionKind::kWriteDone:
        on_write_done(completion.context);
        break;
      case CompletionKind::kError: {
        const uint32_t peer =
            options_.layout.topology.rail_peer(options_.rank, context_node(completion.context));
        throw TransportError("a write to rank " + std::to_string(peer) + " failed: " + completion.error,
                             peer);
      }
    }
  }
  return count > 0;
}

bool Proxy::next_command(Command& command) {
  return ring_.try_pop(command) || (options_.commands != nullptr && options_.commands->try_pop(command));
}

bool Proxy::take_commands() {
  Command command;
  uint32_t taken = 0;
  while (taken < kCommandBatch && next_command(command)) {
    ++taken;
    ++queued_;
    Destination& destination = destinations_[command.destination_node];
    destination.queue.push_back(command);
    // The usual case: nothing is ahead of this one, so it goes out at once.
    if (destination.queue.size() - destination.next == 1) post_from(command.destination_node, destination);
  }
  return taken > 0;
}

bool Proxy::post_queued() {
  bool posted = false;
  for (uint32_t node = 0; node < destinations_.size(); ++node) {
    Destination& destination = destinations_[node];
    if (destination.next < destination.queue.size()) posted |= post_from(node, destination);
  }
  return posted;
}

// Posts what the fabric allows. A destination that refuses holds up only itself.
bool Proxy::post_from(uint32_t node, Destination& destination) {
  bool posted = false;
  while (destination.next < destination.queue.size()) {
    WriteRequest request = request_of(node, destination.queue[destination.next]);
    const uint64_t begin_ns = trace_.enabled() ? TraceBuffer::now_ns() : 0;
    request.context |= (trace_.next() & kSpanBits) << kSpanShift;
    if (fabric_.post_write(request) == PostResult::kAgain) {
      add(counters_.retries, 1);
      if (outstanding_ > destination.outstanding) {
        // The queue may be full of writes to others, for which this destination must not be blamed.
        destination.refusal.end();
      } else {
        destination.refusal.note(request.peer, options_.clock->now(), options_.timeout);
      }
      break;
    }
    posted = true;
    destination.refusal.end();
    ++destination.outstanding;
    ++outstanding_;
    ++destination.next;
    --queued_;
    add(counters_.writes, 1);
    add(counters_.bytes, request.bytes);
    trace_write(request, destination, begin_ns);
  }
  if (destination.next == destination.queue.size()) {
    destination.queue.clear();
    destination.next = 0;
  }
  return posted;
}

WriteRequest Proxy::request_of(uint32_t node, const Command& command) const {
  const Layout& layout = options_.layout;
  const Immediate immediate = Immediate::decode(command.immediate);
  const uint64_t row = layout.row_bytes(immediate.operation);
  WriteRequest request;
  request.peer = layout.topology.rail_peer(options_.rank, node);
  request.rail = rail_of(node_, node, layout.topology.nodes(), immediate.chunk(), rails_);
  request.local_offset = layout.outgoing(immediate.channel, immediate.operation) + command.local_row * row;
  request.remote_offset =
      layout.slot(immediate.channel, immediate.operation, node, node_) + command.first_row * row;
  request.bytes = static_cast<uint32_t>(command.rows * row);
  request.immediate = command.immediate;
  request.context = context_of(node, immediate);
  return request;
}

void Proxy::trace_write(const WriteRequest& request, Destination& destination, uint64_t begin_ns) {
  if (!trace_.enabled()) return;
  const Immediate immediate = Immediate::decode(request.immediate);
  const auto operation = static_cast<uint32_t>(immediate.operation);
  uint32_t& round = destination.rounds[immediate.channel][operation];
  if (immediate.first) ++round;
  trace_.add({.kind = TraceSpan::Kind::kWrite,
              .what = operation,
              .channel = immediate.channel,
              .round = round,
              .peer = request.peer,
              .chunk = immediate.chunk(),
              .bytes = request.bytes,
              .begin_ns = begin_ns});
}

std::vector<TraceSpan> Proxy::trace() {
  const std::lock_guard lock(work_);
  return trace_.spans();
}

uint64_t Proxy::dropped_spans() {
  const std::lock_guard lock(work_);
  return trace_.dropped();
}

void Proxy::on_write_done(uint64_t context) {
  if (trace_.enabled()) trace_.end(context >> kSpanShift, kSpanBits);
  --destinations_[context_node(context)].outstanding;
  --outstanding_;
  add(counters_.completions, 1);
  // Counted here and not there: reading back through a PCIe window takes microseconds.
  publish(options_.layout.completion(context_channel(context), context_operation(context)),
          ++completed_[context_pair(context)]);
}

void Proxy::on_arrival(uint32_t bits) {
  const ArrivingPairs::Chunk chunk = arriving_.take(bits);
  const Immediate& immediate = chunk.immediate;
  add(counters_.immediates, 1);
  if (trace_.enabled()) {
    const uint64_t now = TraceBuffer::now_ns();
    trace_.add({.kind = TraceSpan::Kind::kArrival,
                .what = static_cast<uint32_t>(immediate.operation),
                .channel = immediate.channel,
                .round = chunk.word.round,
                .peer = options_.layout.topology.rail_peer(options_.rank, immediate.source_node),
                .chunk = immediate.chunk(),
                .begin_ns = now,
                .end_ns = now});
  }
  if (!chunk.completes_pair) return;
  publish(options_.layout.arrival(immediate.channel, immediate.operation, immediate.source_node),
          chunk.word.encode());
}

void Proxy::fail(std::exception_ptr error) {
  if (failed_.load(std::memory_order_relaxed)) return;  // the first one counts, and others may be reading it
  failure_ = std::move(error);
  failed_.store(true, std::memory_order_release);
  if (options_.commands != nullptr) options_.commands->end_waits();
}

void Proxy::publish(size_t offset, uint64_t value) const {
  std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(signals_ + offset))
      .store(value, std::memory_order_release);
  if (options_.signals_combine_writes) flush_combined_writes();
}

}  // namespace efa_ep
