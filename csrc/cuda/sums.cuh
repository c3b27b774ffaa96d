// Sums of rows, one by one warp each. From sm_90 on the SM's copy engine reads the rows ahead of need.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/rows.cuh"
#include "cuda/staged_reads.cuh"

namespace efa_ep::cuda {

/// A piece is one vector per lane. Those of 8 warps take 33 KB, and a block gets 48 without asking for more.
using SumStages = Stages<8, 32 * kVectorBytes>;

/// total += weight * row, for 16 bytes of it. The first one is no sum: -0 stays -0.
template <ScalarType kType>
DP_DEVICE void add_term(float (&total)[Numbers<kType>::kCount], uint4 vector, float weight, bool is_first) {
  float numbers[Numbers<kType>::kCount];
  unpack<kType>(vector, numbers);
#pragma unroll
  for (uint32_t n = 0; n < Numbers<kType>::kCount; ++n) {
    const float term = __fmul_rn(weight, numbers[n]);
    total[n] = is_first ? term : __fadd_rn(total[n], term);
  }
}

#if DP_BULK_COPIES

/// Pieces of terms, in the order in which they are summed: all terms' first ones, then their second ones.
class TermPieces {
 public:
  DP_DEVICE TermPieces(StagedReads<SumStages>& reads, const RowList& terms, uint32_t count, uint32_t bytes)
      : reads_(reads), terms_(terms), count_(count), bytes_(bytes) {
    for (uint32_t i = 0; lane_id() == 0 && i < SumStages::kCount; ++i) read_next();
  }

  /// The next piece, for all lanes of a warp.
  DP_DEVICE const std::byte* wait() const { return reads_.wait(); }

  /// All lanes have the piece in registers.
  DP_DEVICE void take() {
    reads_.take();
    __syncwarp();
    if (lane_id() != 0) return;
    dp::fence_proxy_async();  // between what lanes have read and what the copy engine writes there
    read_next();
  }

 private:
  DP_DEVICE void read_next() {
    if (offset_ >= bytes_) return;
    reads_.read(terms_.row[term_] + offset_, SumStages::piece_bytes(bytes_, offset_));
    if (++term_ < count_) return;
    term_ = 0;
    offset_ += SumStages::kPieceBytes;
  }

  StagedReads<SumStages>& reads_;
  const RowList& terms_;
  const uint32_t count_;
  const uint32_t bytes_;
  uint32_t term_ = 0;
  uint32_t offset_ = 0;
};

template <ScalarType kType>
DP_DEVICE void sum_terms(StagedReads<SumStages>& reads, std::byte* out, const RowList& terms, uint32_t count,
                         uint32_t bytes, bool copy) {
  TermPieces pieces(reads, terms, count, bytes);
  for (uint32_t offset = 0; offset < bytes; offset += SumStages::kPieceBytes) {
    const uint32_t at = offset + lane_id() * kVectorBytes;
    const bool is_in_row = at < bytes;
    float total[Numbers<kType>::kCount] = {};
    for (uint32_t term = 0; term < count; ++term) {
      const std::byte* piece = pieces.wait();
      uint4 vector{};
      if (is_in_row) vector = reinterpret_cast<const uint4*>(piece)[lane_id()];
      pieces.take();
      if (copy && is_in_row) dp::st_na(out + at, vector);
      add_term<kType>(total, vector, terms.weight[term], term == 0);
    }
    if (!copy && is_in_row) dp::st_na(out + at, pack<kType>(total));
  }
}

#else

template <ScalarType kType>
DP_DEVICE void sum_terms(StagedReads<SumStages>&, std::byte* out, const RowList& terms, uint32_t count,
                         uint32_t bytes, bool copy) {
  for (uint32_t at = lane_id() * kVectorBytes; at < bytes; at += 32 * kVectorBytes) {
    const uint4 first = dp::ld_na(terms.row[0] + at);
    if (copy) {
      dp::st_na(out + at, first);
      continue;
    }
    float total[Numbers<kType>::kCount];
    add_term<kType>(total, first, terms.weight[0], true);
    for (uint32_t term = 1; term < count; ++term) {
      add_term<kType>(total, dp::ld_na(terms.row[term] + at), terms.weight[term], false);
    }
    dp::st_na(out + at, pack<kType>(total));
  }
}

#endif

/// out = sum over the first `count` rows of the list, in order, of weight * row, in float32 and rounded once:
/// what sum_rows() does on the CPU (cpu/row_math.h), bit for bit. No row gives zeros; a single one of weight
/// 1 is copied. `out` may be one of the rows.
template <ScalarType kType>
DP_DEVICE void sum_rows(StagedReads<SumStages>& reads, std::byte* out, const RowList& terms, uint32_t count,
                        uint32_t bytes) {
  const bool copy = count == 1 && terms.weight[0] == 1.0f;
  if (copy && terms.row[0] == out) return;
  if (count > 0) return sum_terms<kType>(reads, out, terms, count, bytes, copy);
  for (uint32_t at = lane_id() * kVectorBytes; at < bytes; at += 32 * kVectorBytes) {
    dp::st_na(out + at, uint4{0, 0, 0, 0});
  }
}

}  // namespace efa_ep::cuda
