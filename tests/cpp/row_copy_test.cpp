#include "cpu/row_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {
namespace {

class RowCopy : public testing::TestWithParam<Caching> {};

INSTANTIATE_TEST_SUITE_P(Caching, RowCopy, testing::Values(Caching::kThrough, Caching::kPast),
                         [](const auto& info) {
                           return info.param == Caching::kThrough ? "Through" : "Past";
                         });

// What lies before and behind the row stays; where it starts inside a cache line does not matter.
TEST_P(RowCopy, CopiesTheRowAndNothingElse) {
  const uint64_t seed = test_seed(3);
  SCOPED_TRACE("TEST_SEED=" + std::to_string(seed));
  std::mt19937_64 random(seed);
  Bytes from(4096 + 64);
  for (std::byte& byte : from) byte = static_cast<std::byte>(random());
  for (size_t bytes = 0; bytes <= 4096; bytes += bytes < 256 ? 16 : 560) {
    for (size_t start = 0; start <= 64; start += 16) {
      TestMemory to(4096 + 256);
      copy_row(to.data() + start, from.data() + start, bytes, GetParam());
      Bytes want(to.bytes());
      std::copy_n(from.begin() + static_cast<ptrdiff_t>(start), bytes,
                  want.begin() + static_cast<ptrdiff_t>(start));
      ASSERT_TRUE(std::equal(want.begin(), want.end(), to.data())) << bytes << " bytes at " << start;
    }
  }
}

}  // namespace
}  // namespace efa_ep
