// The four halves for memory that the CPU reads and writes. Each is called by one thread per channel.
//
// A send half waits for nobody but room in the proxy's ring. A receive half waits for other ranks, does this
// rank's share of their traffic meanwhile (listing dispatched rows for their owners, summing results of its
// rail). All waits raise RankTimeoutError at their deadline.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "clock.h"
#include "cpu/duration_histogram.h"
#include "cpu/owner_list.h"
#include "cpu/row_copy.h"
#include "cpu/row_ids.h"
#include "cpu/row_math.h"
#include "cpu/timer.h"
#include "half_times.h"
#include "protocol/half.h"
#include "protocol/layout.h"
#include "protocol/placement.h"
#include "protocol/quantisation.h"
#include "protocol/round.h"
#include "proxy/proxy.h"
#include "proxy/wait.h"

namespace efa_ep {

struct CpuDeviceOptions {
  Layout layout;
  uint32_t rank = 0;
  std::vector<uint32_t> expert_owner;  ///< owner rank of every expert, or kNoOwner
  ScalarType combine_type = ScalarType::kBfloat16;
  bool per_expert = false;  ///< output layout: [experts, capacity, ...] instead of [rows, ...]
  Quantisation quantisation = Quantisation::kNone;
  std::chrono::nanoseconds timeout = std::chrono::seconds(120);  ///< of every wait
  const DeadlineClock* clock = &kSteadyClock;                    ///< of that time; outlives the device
  InterruptCheck check_interrupt = nullptr;
  /// A half that copies more rows than fit into so many bytes copies them past the caches.
  size_t cached_bytes = std::numeric_limits<size_t>::max();
  size_t trace_spans = 0;  ///< newest spans of a trace to keep per channel; 0: none
};

/// Tokens to send. All tables are contiguous, row by row.
struct DispatchInput {
  /// [tokens] rows `x_stride` bytes apart: of payload_bytes, or with quantisation of payload_bytes bf16
  /// values. Rows in activations() are read there by the own node, and by the network wherever a whole chunk
  /// of them lies side by side; they cannot be quantised.
  const std::byte* x = nullptr;
  size_t x_stride = 0;
  const std::byte* scales = nullptr;  ///< [tokens] rows of scale_bytes; unused if that is 0, or quantised
  const void* ids = nullptr;          ///< [tokens, top_k] int32 or int64; -1 drops the slot
  bool ids_are_64_bit = false;
  const float* weights = nullptr;  ///< [tokens, top_k]
  uint32_t tokens = 0;
  const int32_t* token_count = nullptr;  ///< if not null, how many of them count
};

/// Where received rows go. In the per_token layout M is what dispatch_wait() returned; in the per_expert
/// layout the payload is [local experts, capacity] rows with capacity = world * max_tokens, and ids and
/// weights are not written.
struct DispatchOutput {
  std::byte* x = nullptr;                ///< [M] rows, or [experts, capacity] rows, of payload_bytes
  std::byte* scales = nullptr;           ///< likewise of scale_bytes
  int32_t* ids = nullptr;                ///< [M, top_k] global ids
  float* weights = nullptr;              ///< [M, top_k]
  int32_t* tokens_per_expert = nullptr;  ///< [local experts]
};

/// Expert results, in the order of the DispatchOutput.
struct CombineInput {
  /// per_token: [M] rows, one per received row, or with `per_slot` [M, top_k] rows of which only the slots of
  /// own experts are read. per_expert: [local experts, capacity] rows. [M] rows that lie in results() already
  /// are sent from there, without a copy.
  const std::byte* rows = nullptr;
  bool per_slot = false;
  bool weights_applied = true;  ///< false: multiply each slot's row with its router weight here
};

/// Totals since the start.
struct DeviceCounters {
  uint64_t rounds = 0;
  uint64_t tokens = 0;         ///< tokens dispatched by this rank
  uint64_t network_rows = 0;   ///< rows put on the network by this rank, both operations
  uint64_t peer_rows = 0;      ///< rows offered to ranks of the own node, both operations
  uint64_t received_rows = 0;  ///< rows received for own experts
  uint64_t dropped_slots = 0;  ///< slots of those tokens whose expert has no owner
  double dropped_weight = 0;   ///< the sum of their weights
};

class CpuDevice {
 public:
  /// `arenas[i]` is the arena of the rank with index i of this node, mapped here; `proxy` may be null if the
  /// world has one node. Both outlive the device.
  CpuDevice(const CpuDeviceOptions& options, std::vector<std::byte*> arenas, Proxy* proxy);

  /// Where the caller may produce the activations of its next round, Layout::dispatch_row() bytes apart, from
  /// the end of combine_recv() to the start of dispatch_send().
  std::byte* activations(uint32_t channel) const { return own_arena() + layout_.activations(channel); }

  /// Starts a round on `channel`. Reads the input completely before it returns, unless it lies in
  /// activations(). Throws ConfigurationError, with nothing sent, for too many tokens or an id out of range.
  void dispatch_send(uint32_t channel, const DispatchInput& input);

  /// Whether all rows of the round for this rank's experts are here. Does what it can of this rank's share,
  /// and waits for nobody; the caller drives the proxy.
  bool dispatch_ready(uint32_t channel);

  /// Waits until dispatch_ready(). Returns the number of rows.
  uint32_t dispatch_wait(uint32_t channel);

  /// Writes the rows in (source rank, token) order. After dispatch_wait().
  void dispatch_pack(uint32_t channel, const DispatchOutput& output);

  /// Where combine_send() puts, or finds, the [M] rows to send: room for capacity() rows. Valid for the
  /// caller to write from the end of dispatch_wait() to the start of combine_send().
  std::byte* results(uint32_t channel) const { return own_arena() + layout_.results(channel); }

  /// Sends results back. Reads the input completely before it returns, unless it lies in results().
  void combine_send(uint32_t channel, const CombineInput& input);

  /// Whether all results are here; like dispatch_ready().
  bool combine_ready(uint32_t channel);

  /// Waits for all results and writes out[tokens] rows of combine_bytes; a token without experts gets zeros.
  void combine_recv(uint32_t channel, std::byte* out);

  uint32_t local_experts() const { return local_experts_; }
  uint32_t capacity() const { return options_.layout.topology.world * options_.layout.max_tokens; }
  /// Tokens of the round in flight on `channel`.
  uint32_t tokens(uint32_t channel) const { return channels_.at(channel).tokens; }
  DeviceCounters counters() const;
  HalfTimes times() const;
  /// Halves and waits of the past. No half may be running.
  std::vector<TraceSpan> trace() const;
  uint64_t dropped_spans() const;

 private:
  static constexpr uint32_t kNobody = UINT32_MAX;
  enum class Stage : uint8_t { kIdle, kDispatchSent, kDispatchReady, kPacked, kCombineSent };

  /// A rank whose rows this rank's experts receive, in source rank order.
  struct Source {
    uint32_t rank = 0;
    uint32_t holder = 0;         // index of the local rank in whose arena the rows lie
    size_t section = 0;          // where the numbering of its rows starts there
    std::vector<uint32_t> rows;  // numbers of the rows for this rank's experts
    uint32_t first_row = 0;      // the first of them in this rank's output
    bool ready = false;
  };
  struct Channel {
    Stage stage = Stage::kIdle;
    uint32_t round = 0;
    uint32_t tokens = 0;
    std::vector<std::byte> codes, scales;             // [tokens], of quantised tokens
    std::vector<int32_t> ids;                         // [tokens][top_k]
    std::vector<std::vector<uint32_t>> destinations;  // [nodes + ranks_per_node] tokens, ascending
    std::vector<uint32_t> staged_rows;  // [tokens] number of a row that holds the token, or kNotStaged
    std::vector<Source> sources;
    uint32_t received = 0;            // rows received from all sources
    std::vector<uint32_t> slot_rows;  // rows in each remote node's dispatch slot
    std::vector<uint32_t> listed;     // [nodes][ranks_per_node] rows offered to each local rank of those
    std::vector<bool> summed;         // remote nodes to which this round's node sums have been sent
    std::vector<uint32_t> positions;  // per_expert: [row][top_k] position among the rows of the slot's expert
    std::array<uint64_t, kOperations> submitted{};       // writes handed to the proxy so far
    std::array<uint64_t, kHalves> half_ns{}, wait_ns{};  // of the round in flight
    TraceBuffer trace;
    Half half = Half::kDispatchSend;  // the one that runs, or ran last
    bool waiting = false;
    uint32_t missing = kNobody;  // a rank that was missing when somebody last looked
  };
  /// A wait of a channel. They nest: summing results for the network may have to wait for room in the ring.
  struct WaitScope {
    explicit WaitScope(Channel& channel)
        : channel(channel), outermost(!std::exchange(channel.waiting, true)) {}
    ~WaitScope() {
      if (outermost) channel.waiting = false;
    }
    WaitScope(const WaitScope&) = delete;
    WaitScope& operator=(const WaitScope&) = delete;
    Channel& channel;
    const bool outermost;
  };
  struct AtomicCounters {
    std::atomic<uint64_t> rounds{0}, tokens{0}, network_rows{0}, peer_rows{0}, received_rows{0},
        dropped_slots{0};
    std::atomic<double> dropped_weight{0};
    std::array<std::atomic<uint64_t>, kHalves> half_ns{}, wait_ns{};
    std::array<DurationHistogram, kHalves> half_histogram, wait_histogram;
    std::vector<std::atomic<uint64_t>> waited_for_ns;
  };

  // dispatch.cpp
  uint32_t counted_tokens(const DispatchInput& input) const;
  void quantise(Channel& channel, DispatchInput& input) const;
  template <class Id>
  void route(Channel& channel, const DispatchInput& input);
  void stage_row(uint32_t channel_index, uint32_t row, const DispatchInput& input, uint32_t token);
  void stage_in_place(uint32_t channel_index, const DispatchInput& input, uint32_t token);
  std::byte* describe_row(uint32_t channel_index, uint32_t row, const DispatchInput& input,
                          uint32_t token) const;
  void stage_and_post(uint32_t channel_index, uint32_t node, const DispatchInput& input);
  void offer_to_own_node(uint32_t channel_index, const DispatchInput& input);
  void publish_list(uint32_t channel_index, uint32_t source_node, uint32_t owner, uint32_t rows);
  bool receive_sources(uint32_t channel_index);
  void take_list(uint32_t channel_index, Source& source, uint32_t rows) const;
  void forward(uint32_t channel_index, Source& source, uint32_t rows);
  const std::byte* row_of(const Source& source, uint32_t row) const {
    return arenas_[source.holder] + source.section + source.rows[row] * layout_.dispatch_row();
  }
  void copy_activation(const std::byte* row, const DispatchOutput& output, size_t place,
                       Caching caching) const;
  void pack_per_token(uint32_t channel_index, const DispatchOutput& output) const;
  void pack_per_expert(uint32_t channel_index, const DispatchOutput& output);

  // combine.cpp
  void reduce_row(uint32_t channel_index, const CombineInput& input, const Source& source,
                  uint32_t row) const;
  void offer_results(uint32_t channel_index, const CombineInput& input, const Source& source);
  bool sum_rail(uint32_t channel_index);
  bool sums_arrived(uint32_t channel_index, uint32_t node) const;
  bool results_offered(uint32_t channel_index, uint32_t source_node, uint32_t owner) const;
  const std::byte* results_of(uint32_t channel_index, uint32_t source_node, uint32_t owner,
                              size_t rows) const;
  void sum_node(uint32_t channel_index, uint32_t node);
  void gather(uint32_t channel_index, std::byte* out) const;

  // device.cpp
  void require(uint32_t channel_index, Stage stage, const char* call) const;
  void post_rows(uint32_t channel_index, Operation operation, uint32_t node, uint32_t rows,
                 const std::function<uint32_t(uint32_t first, uint32_t count)>& make_rows);
  bool sent(uint32_t channel_index, Operation operation) const;
  std::vector<uint32_t> unfinished_peers() const;
  ScopedTimer time_half(Half half, Channel& channel) {
    channel.half = half;
    const auto index = static_cast<size_t>(half);
    return {counters_.half_ns[index], channel.half_ns[index], channel.trace,
            span_of(TraceSpan::Kind::kHalf, half, channel)};
  }
  TraceSpan span_of(TraceSpan::Kind kind, Half half, const Channel& channel) const {
    return {.kind = kind,
            .what = static_cast<uint32_t>(half),
            .channel = static_cast<uint32_t>(&channel - channels_.data()),
            .round = channel.round + (half == Half::kDispatchSend && channel.stage == Stage::kIdle)};
  }
  void record_round(Channel& channel);
  void wait(Channel& channel, const std::function<bool()>& ready,
            const std::function<std::vector<uint32_t>()>& missing);
  OwnerList owners_of(const RowIds& ids) const;
  /// How a half copies that many rows.
  Caching caching(size_t rows, size_t row_bytes) const {
    return rows * row_bytes > options_.cached_bytes ? Caching::kPast : Caching::kThrough;
  }
  bool is_own(int32_t id) const { return id >= 0 && placement_.owner(id) == options_.rank; }
  RowIds ids_of(const std::byte* row) const { return RowIds(row, layout_.row.top_k); }
  const float* weights_of(const std::byte* row) const {
    return reinterpret_cast<const float*>(row + layout_.row.weights_offset());
  }
  std::byte* own_arena() const { return arenas_[index_]; }
  std::atomic_ref<uint64_t> word(std::byte* arena, size_t offset) const {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(arena + offset));
  }
  RoundWord read_word(size_t offset) const {
    return RoundWord::decode(word(own_arena(), offset).load(std::memory_order_acquire));
  }

  // Tokens go to other nodes as a whole, and to each rank of the own one.
  uint32_t destination_of(uint32_t rank) const {
    const uint32_t node = topology_.node_of(rank);
    return node == node_ ? topology_.nodes() + topology_.index_of(rank) : node;
  }
  const std::vector<uint32_t>& tokens_for_node(uint32_t channel_index, uint32_t node) const {
    return channels_[channel_index].destinations[node];
  }
  const std::vector<uint32_t>& tokens_for_owner(uint32_t channel_index, uint32_t owner) const {
    return channels_[channel_index].destinations[topology_.nodes() + owner];
  }

  const CpuDeviceOptions options_;
  const Layout& layout_;
  const Topology topology_;
  const uint32_t node_;
  const uint32_t index_;
  const Placement placement_;
  std::vector<uint32_t> destination_of_expert_;  // or kNoOwner
  const uint32_t local_experts_;
  const std::vector<std::byte*> arenas_;
  Proxy* const proxy_;
  std::vector<Channel> channels_;
  AtomicCounters counters_;
};

}  // namespace efa_ep
