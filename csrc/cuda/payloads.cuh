// How dispatch_recv's payloads get to its output, mostly out of other GPUs' memory. From sm_90 on the SM's
// copy engine moves them; before, they pass through registers.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/staged_reads.cuh"

namespace efa_ep::cuda {

/// One more than are read at a time: one is being written. Those of 8 warps take 41 KB, and a block gets 48
/// without asking for more.
using PayloadStages = Stages<5, 1024>;

/// The payloads of a warp's rows: first that of `warp_in_grid()`, then each `warps_in_grid()`-th.
class Payloads {
 public:
  DP_DEVICE Payloads(const Context& at, PayloadStages& stages)
      : at_(at), reads_(stages), next_row_(warp_in_grid()) {
#if DP_BULK_COPIES
    for (uint32_t i = 0; lane_id() == 0 && i < PayloadStages::kCount - 1; ++i) read_next();
#endif
  }

  /// Writes the next payload to the first `count` rows of the list. All lanes of a warp call it together.
  DP_DEVICE void write_next(const RowList& to, uint32_t count) {
    const RowShape& shape = at_.layout().row;
#if DP_BULK_COPIES
    // Nobody but the copy engine looks at the stages, so the first lane can do it all.
    for (uint32_t offset = 0; lane_id() == 0 && offset < shape.payload_bytes;
         offset += PayloadStages::kPieceBytes) {
      const uint32_t bytes = PayloadStages::piece_bytes(shape.payload_bytes, offset);
      const std::byte* piece = reads_.wait();
      for (uint32_t i = 0; i < count; ++i) dp::bulk_store(to.row[i] + offset, piece, bytes);
      dp::bulk_commit_group();
      reads_.take();
      dp::bulk_wait_group_read<1>();  // the stage before this one is free
      read_next();
    }
#else
    copy_vectors(at_.channel.received[next_row_] + shape.payload_offset(), to, count, 0, shape.payload_bytes);
    next_row_ += warps_in_grid();
#endif
  }

  /// To be called before the kernel ends, when all payloads are written.
  DP_DEVICE void finish() {
#if DP_BULK_COPIES
    if (lane_id() == 0) dp::bulk_wait_group<0>();
#endif
  }

 private:
#if DP_BULK_COPIES
  DP_DEVICE void read_next() {
    if (next_row_ >= at_.counters().received) return;
    const RowShape& shape = at_.layout().row;
    reads_.read(at_.channel.received[next_row_] + shape.payload_offset() + next_offset_,
                PayloadStages::piece_bytes(shape.payload_bytes, next_offset_));
    next_offset_ += PayloadStages::kPieceBytes;
    if (next_offset_ < shape.payload_bytes) return;
    next_offset_ = 0;
    next_row_ += warps_in_grid();
  }

  uint32_t next_offset_ = 0;
#endif
  const Context& at_;
  StagedReads<PayloadStages> reads_;
  uint32_t next_row_;
};

}  // namespace efa_ep::cuda
