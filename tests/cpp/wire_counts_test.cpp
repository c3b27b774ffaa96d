// The counts that the comparison with other protocols rests on. That real rounds post exactly as many writes
// and bytes as Chunking and Layout say is tests/python/test_wire_counts.py's matter.
#include "testing/wire_counts.h"

#include <gtest/gtest.h>

#include <array>

#include "testing/wire_counts_run.h"

namespace efa_ep::wire_counts {
namespace {

constexpr uint64_t kUncut = uint64_t{1} << 30;

TEST(WireCounts, At64RanksWith2NicsAnd128Tokens) {
  const Shape shape{.ranks = 64, .nics = 2};
  EXPECT_EQ(ours(shape, "", kUncut).work_requests, 28u);
  EXPECT_LE(ours(shape, "", 256 << 10).work_requests, 56u);
  EXPECT_LE(ours(shape, "", 128 << 10).work_requests, 105u);
  EXPECT_EQ(pplx_garden(shape).work_requests, 357u);
  EXPECT_EQ(pplx_garden(shape).most_work_requests, 469u);
}

// The same in a run, for the rank that has the most rows, too.
TEST(WireCounts, At64RanksWith2NicsAnd128TokensInARun) {
#ifdef EFA_EP_SANITIZED
  GTEST_SKIP() << "3 GB, several times that with a sanitizer";
#endif
  const Shape shape{.ranks = 64, .nics = 2};
  EXPECT_EQ(count_in_a_run(shape, kUncut, 3).most_writes, 28u);
  EXPECT_LE(count_in_a_run(shape, 128 << 10, 3).most_writes, 105u);
}

// 2 (N - 1) NICs writes if a pair fits one chunk per NIC; no fence, no barrier, in any world.
TEST(WireCounts, OursGrowWithNodesAndNothingElse) {
  for (const uint32_t ranks : {16u, 32u, 64u, 128u}) {
    for (const uint32_t nics : {1u, 2u, 4u}) {
      const Shape shape{.ranks = ranks, .nics = nics};
      for (const Counts& counts : {ours(shape, "", kUncut), ours(shape, "", 128 << 10)}) {
        EXPECT_EQ(counts.fences + counts.barriers, 0u);
        EXPECT_LT(counts.most_work_requests, pplx_garden(shape).work_requests) << ranks << ", " << nics;
        EXPECT_LT(counts.wire_bytes, pplx_garden(shape).wire_bytes) << ranks << ", " << nics;
        EXPECT_LT(counts.work_requests, deepep_low_latency(shape).work_requests) << ranks << ", " << nics;
      }
      EXPECT_EQ(ours(shape, "", kUncut).work_requests, 2 * (ranks / 8 - 1) * nics);
    }
  }
}

// Expected numbers of rows against those of random tokens, in worlds that run.
TEST(WireCounts, RunsCostWhatTheFormulasSay) {
  for (const Shape& shape : {Shape{.ranks = 16, .nics = 1, .hidden = 256}, Shape{.ranks = 32, .hidden = 256},
                             Shape{.ranks = 32, .nics = 4, .tokens = 32, .hidden = 256}}) {
    for (const uint64_t chunk_bytes : {kUncut, uint64_t{8} << 10}) {
      const Counts formula = ours(shape, "", chunk_bytes);
      const Counted run = count_in_a_run(shape, chunk_bytes, 7);
      EXPECT_EQ(run.fences, 0u);
      EXPECT_EQ(run.arena_bytes, formula.buffer_bytes);
      EXPECT_NEAR(run.wire_bytes, formula.wire_bytes, 0.02 * formula.wire_bytes);
      EXPECT_LE(run.writes, static_cast<double>(formula.most_work_requests));
      EXPECT_NEAR(run.writes, static_cast<double>(formula.work_requests), 0.1 * run.writes);
    }
  }
}

// Tokens of 128 that cross to another node, against all 128 x 8 rows: 8 of 256 experts drawn at random.
TEST(WireCounts, RowsPerNodeAreTheExpectedOnes) {
  EXPECT_NEAR(rows_per_node({.ranks = 16}) * 1 / 128, 1.00, 0.005);
  EXPECT_NEAR(rows_per_node({.ranks = 32}) * 3 / 128, 2.71, 0.005);
  EXPECT_NEAR(rows_per_node({.ranks = 64}) * 7 / 128, 4.63, 0.005);
  EXPECT_NEAR(rows_per_node({.ranks = 128}) * 15 / 128, 6.12, 0.005);
}

// What other protocols post, per rank and layer, as their published code does.
struct Published {
  uint32_t ranks;
  std::array<uint64_t, 3> least, most;  // with 1, 2 and 4 NICs
};
TEST(WireCounts, PplxGardenIsAsPublished) {
  constexpr std::array<uint32_t, 3> kNics = {1, 2, 4};
  for (const Published& row :
       {Published{16, {61, 69, 85}, {69, 85, 117}}, Published{32, {141, 165, 213}, {165, 213, 309}},
        Published{64, {301, 357, 469}, {357, 469, 693}}, Published{128, {621, 741, 981}, {741, 981, 1461}}}) {
    for (size_t i = 0; i < kNics.size(); ++i) {
      const Counts counts = pplx_garden({.ranks = row.ranks, .nics = kNics[i]});
      EXPECT_EQ(counts.work_requests, row.least[i]) << row.ranks;
      EXPECT_EQ(counts.most_work_requests, row.most[i]) << row.ranks;
      EXPECT_EQ(counts.barriers, 2u);
    }
  }
}

// A signal per (expert, remote rank): Perseus needs as many times fewer fences as a rank has experts.
TEST(WireCounts, PutAndSignalIsAsPublished) {
  const Shape eight{.ranks = 16, .ranks_per_node = 4, .experts = 128};
  EXPECT_EQ(put_signal_dispatch(eight, false).fences, 96u);
  EXPECT_EQ(put_signal_dispatch(eight, true).fences, 12u);
  const Shape four{.ranks = 32, .ranks_per_node = 4, .experts = 128};
  EXPECT_EQ(put_signal_dispatch(four, false).fences, 112u);
  EXPECT_EQ(put_signal_dispatch(four, true).fences, 28u);
}

}  // namespace
}  // namespace efa_ep::wire_counts
