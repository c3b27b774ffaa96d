// What one rank and one layer cost on the wire, by this project's code and by the published formulas of
// others. Uniform routing of `tokens` tokens to `top_k` of `experts` experts, fp8 rows with scales out,
// bfloat16 rows back.
//
// Sources of the others' formulas, which are restated here in our own words:
//   pplx-garden          perplexityai/pplx-garden, p2p-all-to-all (arXiv 2510.27656): a table of counts and
//   two
//                        barriers with every rank, one private range per remote rank, what does not fit there
//                        and the combine ranges cut over all NICs
//   DeepEP low latency   deepseek-ai/DeepEP, csrc/kernels/internode_ll.cu and csrc/config.hpp: one put per
//                        (token, expert) and direction, one flag per remote expert and direction
//   put + signal         FlashMoE on a proxy, and Perseus (arXiv 2605.00686): one put and signal per (expert,
//                        remote rank); a fence for each, or with Perseus one per remote rank. Dispatch alone
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "protocol/chunking.h"
#include "protocol/layout.h"

namespace efa_ep::wire_counts {

struct Shape {
  uint32_t ranks = 64;
  uint32_t nics = 2;
  uint32_t ranks_per_node = 8;
  uint32_t tokens = 128;
  uint32_t experts = 256;
  uint32_t top_k = 8;
  uint32_t hidden = 7168;

  uint32_t nodes() const { return ranks / ranks_per_node; }
  uint32_t remote_ranks() const { return ranks - ranks_per_node; }
  double remote_share() const { return static_cast<double>(nodes() - 1) / nodes(); }
  uint32_t scale_bytes() const { return hidden / 128 * 4; }
  uint32_t combine_bytes() const { return hidden * 2; }
};

struct Counts {
  std::string protocol;
  uint64_t work_requests = 0;
  uint64_t most_work_requests = 0;  ///< if the routing is uneven
  uint64_t fences = 0;
  uint64_t barriers = 0;
  double wire_bytes = 0;
  uint64_t buffer_bytes = 0;  ///< registered memory of one rank; 0: not published
};

/// Tokens of a rank that have at least one of their experts on a given other node.
inline double rows_per_node(const Shape& shape) {
  // None of k distinct experts among the node's: C(E - E/N, k) / C(E, k).
  double none = 1;
  const double elsewhere = shape.experts - static_cast<double>(shape.experts) / shape.nodes();
  for (uint32_t i = 0; i < shape.top_k; ++i) none *= (elsewhere - i) / (shape.experts - i);
  return shape.tokens * (1 - none);
}

inline Layout layout_of(const Shape& shape) {
  Layout layout;
  layout.topology = {shape.ranks, shape.ranks_per_node};
  layout.row = {.top_k = shape.top_k,
                .payload_bytes = shape.hidden,
                .scale_bytes = shape.scale_bytes(),
                .combine_bytes = shape.combine_bytes()};
  layout.max_tokens = shape.tokens;
  return layout;
}

/// This project's, from the code that cuts and lays out. `chunk_bytes` as EFA_EP_CHUNK_BYTES.
inline Counts ours(const Shape& shape, const std::string& name, uint64_t chunk_bytes) {
  const Layout layout = layout_of(shape);
  const double rows = rows_per_node(shape);
  const auto writes = [&](double pair_rows) {
    uint64_t sum = 0;
    for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
      sum += Chunking::of(static_cast<uint32_t>(std::ceil(pair_rows)), layout.row_bytes(operation),
                          chunk_bytes, shape.nics)
                 .chunks;
    }
    return sum * (shape.nodes() - 1);
  };
  return {.protocol = "ours, " + name,
          .work_requests = writes(rows),
          .most_work_requests = writes(shape.tokens),
          .wire_bytes =
              rows * (shape.nodes() - 1) * static_cast<double>(layout.dispatch_row() + layout.combine_row()),
          .buffer_bytes = layout.total_bytes()};
}

/// Bytes of all (token, expert) rows to other nodes and back, with `header` bytes in front of each row out.
inline double row_per_expert_bytes(const Shape& shape, uint32_t header) {
  return shape.tokens * shape.top_k * shape.remote_share() *
         (header + shape.hidden + shape.scale_bytes() + shape.combine_bytes());
}

inline Counts pplx_garden(const Shape& shape) {
  constexpr uint64_t kPrivateTokens = 256;  // as its benchmark sets it
  const uint64_t route_or_barrier = shape.ranks - 1;
  const uint64_t on_all_nics = uint64_t{shape.remote_ranks()} * shape.nics;
  const uint64_t all_tokens = uint64_t{shape.tokens} * shape.ranks;
  const uint64_t local_experts = (shape.experts + shape.ranks - 1) / shape.ranks;
  const uint64_t received =
      kPrivateTokens * shape.ranks + std::min(all_tokens * shape.top_k, all_tokens * local_experts);
  Counts counts{.protocol = "pplx-garden",
                .work_requests = 3 * route_or_barrier + shape.remote_ranks() + on_all_nics,
                .barriers = 2,
                .wire_bytes = row_per_expert_bytes(shape, 16) +
                              static_cast<double>(route_or_barrier) * shape.experts * 4,
                .buffer_bytes = 2 * align_up(received * shape.combine_bytes(), 4096)};
  counts.most_work_requests = counts.work_requests + on_all_nics;
  return counts;
}

inline Counts deepep_low_latency(const Shape& shape) {
  const uint64_t pairs = uint64_t{shape.tokens} * shape.top_k + shape.experts;
  const uint64_t work_requests = 2 * pairs * (shape.nodes() - 1) / shape.nodes();
  const uint64_t rows = uint64_t{shape.experts} * shape.tokens;
  const uint64_t dispatch_row = 16 + std::max(2 * shape.hidden, shape.hidden + shape.scale_bytes());
  return {.protocol = "DeepEP low latency",
          .work_requests = work_requests,
          .most_work_requests = work_requests,
          .wire_bytes = row_per_expert_bytes(shape, 16),
          .buffer_bytes = 2 * rows * shape.combine_bytes() + 2 * rows * dispatch_row};
}

/// `decoupled`: Perseus, one fence per remote rank.
inline Counts put_signal_dispatch(const Shape& shape, bool decoupled) {
  const uint64_t transfers = uint64_t{shape.remote_ranks()} * shape.experts / shape.ranks;
  return {.protocol = decoupled ? "put + signal (dispatch), Perseus" : "put + signal (dispatch), coupled",
          .work_requests = 2 * transfers,
          .most_work_requests = 2 * transfers,
          .fences = decoupled ? shape.remote_ranks() : transfers,
          .wire_bytes = shape.tokens * shape.top_k * shape.remote_share() * shape.combine_bytes()};
}

inline std::vector<Counts> all(const Shape& shape) {
  return {ours(shape, "a chunk per NIC", uint64_t{1} << 30),
          ours(shape, "256 KB chunks", 256 << 10),
          ours(shape, "128 KB chunks", 128 << 10),
          pplx_garden(shape),
          deepep_low_latency(shape),
          put_signal_dispatch(shape, false),
          put_signal_dispatch(shape, true)};
}

}  // namespace efa_ep::wire_counts
