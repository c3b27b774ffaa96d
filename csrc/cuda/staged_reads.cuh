// Rows that the SM's copy engine reads ahead of need, piece by piece, into shared memory (sm_90 on): no
// registers hold what is under way, so that more of it is. Before sm_90 all of this is empty.
#pragma once

#include "cuda/kernel.cuh"

namespace efa_ep::cuda {

/// A warp's pieces, in shared memory.
template <uint32_t kStages, uint32_t kBytes>
struct Stages {
  static constexpr uint32_t kCount = kStages;
  static constexpr uint32_t kPieceBytes = kBytes;
#if DP_BULK_COPIES
  alignas(16) std::byte piece[kCount][kPieceBytes];
  uint64_t arrived[kCount];  // mbarriers, of one phase per piece
#endif

  /// The bytes of a row's piece that starts at `offset`.
  DP_DEVICE static uint32_t piece_bytes(uint32_t row_bytes, uint32_t offset) {
    const uint32_t left = row_bytes - offset;
    return left < kPieceBytes ? left : kPieceBytes;
  }
};

/// One warp's reads. Pieces are taken in the order in which they are read.
template <class AnyStages>
class StagedReads {
 public:
#if DP_BULK_COPIES
  /// All lanes of a warp call it together, when they may read the rows: what was acquired before is seen.
  DP_DEVICE explicit StagedReads(AnyStages& stages) : stages_(stages) {
    if (lane_id() == 0) {
      for (uint32_t i = 0; i < AnyStages::kCount; ++i) dp::mbarrier_init(&stages_.arrived[i], 1);
      dp::fence_proxy_async();
    }
    __syncwarp();
  }

  /// Starts to read a piece of at most kPieceBytes, a multiple of 16. For the first lane, and at most as many
  /// as there are stages ahead of take().
  DP_DEVICE void read(const std::byte* from, uint32_t bytes) {
    const uint32_t stage = read_++ % AnyStages::kCount;
    dp::mbarrier_arrive_expect_tx(&stages_.arrived[stage], bytes);
    dp::bulk_load(stages_.piece[stage], from, bytes, &stages_.arrived[stage]);
  }

  /// Waits for the next piece. Ends as every load does, so there is no deadline.
  DP_DEVICE const std::byte* wait() const {
    const uint32_t stage = taken_ % AnyStages::kCount;
    while (!dp::mbarrier_try_wait(&stages_.arrived[stage], taken_ / AnyStages::kCount % 2)) {
    }
    return stages_.piece[stage];
  }

  /// Frees the stage of the piece that was waited for. Who has looked at it, has to be behind a proxy fence
  /// before the next read().
  DP_DEVICE void take() { ++taken_; }

 private:
  AnyStages& stages_;
  uint32_t read_ = 0;
  uint32_t taken_ = 0;
#else
  DP_DEVICE explicit StagedReads(AnyStages&) {}
#endif
};

}  // namespace efa_ep::cuda
