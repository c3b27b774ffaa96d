// How dispatch_recv's payloads get to its output: mostly out of other GPUs' memory, so what counts is how
// many bytes are under way. From sm_90 on the SM's copy engine reads them into shared memory ahead of need;
// before, they pass through registers. Sums need registers (rows.cuh).
#pragma once

#include "cuda/rows.cuh"

namespace efa_ep::cuda {

#if DP_BULK_COPIES

/// A warp's pieces of rows on their way, in shared memory: three being read while one is being written. Those
/// of 8 warps are 41 KB, just below what a block gets without asking for more.
struct PayloadStages {
  static constexpr uint32_t kStages = 4;
  static constexpr uint32_t kPieceBytes = 1280;
  alignas(kVectorBytes) std::byte piece[kStages][kPieceBytes];
  uint64_t arrived[kStages];  // mbarriers
};

/// The payloads of a warp's rows: first that of `warp_in_grid()`, then each `warps_in_grid()`-th. The first
/// lane does it all; nobody else looks at the stages, so that all accesses to them are the copy engine's.
class Payloads {
 public:
  DP_DEVICE Payloads(const Context& at, PayloadStages& stages)
      : at_(at), stages_(stages), next_row_(warp_in_grid()) {
    if (lane_id() != 0) return;
    for (uint32_t i = 0; i < PayloadStages::kStages; ++i) dp::mbarrier_init(&stages_.arrived[i], 1);
    // Both for the barriers and for the rows, which earlier kernels have acquired.
    dp::fence_proxy_async();
    for (uint32_t i = 0; i < PayloadStages::kStages - 1; ++i) read_next();
  }

  /// Writes the next payload to the first `count` rows of the list. All lanes of a warp call it together.
  DP_DEVICE void write_next(const RowList& to, uint32_t count) {
    if (lane_id() != 0) return;
    const uint32_t bytes = at_.layout().row.payload_bytes;
    for (uint32_t offset = 0; offset < bytes; offset += PayloadStages::kPieceBytes) {
      const uint32_t stage = written_ % PayloadStages::kStages;
      // Ends as every load does, so there is no deadline.
      while (!dp::mbarrier_try_wait(&stages_.arrived[stage], written_ / PayloadStages::kStages % 2)) {
      }
      for (uint32_t i = 0; i < count; ++i) {
        dp::bulk_store(to.row[i] + offset, stages_.piece[stage], piece_bytes(offset));
      }
      dp::bulk_commit_group();
      ++written_;
      dp::bulk_wait_group_read<1>();  // the stage before this one is free
      read_next();
    }
  }

  /// To be called before the kernel ends, when all payloads are written.
  DP_DEVICE void finish() {
    if (lane_id() == 0) dp::bulk_wait_group<0>();
  }

 private:
  DP_DEVICE uint32_t piece_bytes(uint32_t offset) const {
    const uint32_t left = at_.layout().row.payload_bytes - offset;
    return left < PayloadStages::kPieceBytes ? left : PayloadStages::kPieceBytes;
  }

  DP_DEVICE void read_next() {
    if (next_row_ >= at_.counters().received) return;
    const RowShape& shape = at_.layout().row;
    const uint32_t stage = read_ % PayloadStages::kStages;
    const uint32_t bytes = piece_bytes(next_offset_);
    const std::byte* from = at_.channel.received[next_row_] + shape.payload_offset() + next_offset_;
    dp::mbarrier_arrive_expect_tx(&stages_.arrived[stage], bytes);
    dp::bulk_load(stages_.piece[stage], from, bytes, &stages_.arrived[stage]);
    ++read_;
    next_offset_ += PayloadStages::kPieceBytes;
    if (next_offset_ < shape.payload_bytes) return;
    next_offset_ = 0;
    next_row_ += warps_in_grid();
  }

  const Context& at_;
  PayloadStages& stages_;
  uint32_t next_row_;
  uint32_t next_offset_ = 0;
  uint32_t read_ = 0;     // pieces
  uint32_t written_ = 0;  // pieces
};

#else

struct PayloadStages {};

class Payloads {
 public:
  DP_DEVICE Payloads(const Context& at, PayloadStages&) : at_(at), next_row_(warp_in_grid()) {}

  DP_DEVICE void write_next(const RowList& to, uint32_t count) {
    const RowShape& shape = at_.layout().row;
    copy_vectors(at_.channel.received[next_row_] + shape.payload_offset(), to, count, 0, shape.payload_bytes);
    next_row_ += warps_in_grid();
  }

  DP_DEVICE void finish() {}

 private:
  const Context& at_;
  uint32_t next_row_;
};

#endif

}  // namespace efa_ep::cuda
