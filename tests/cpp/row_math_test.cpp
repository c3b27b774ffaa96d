#include "cpu/row_math.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "scalar_oracle.h"
#include "test_environment.h"
#include "test_memory.h"

namespace efa_ep {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class RowMath : public testing::TestWithParam<ScalarType> {
 protected:
  size_t width() const { return scalar_bytes(GetParam()); }
  uint32_t bits(const Bytes& row, size_t i) const {
    return oracle::load_bits(GetParam(), row.data() + i * width());
  }
  float value(const Bytes& row, size_t i) const { return oracle::decode(GetParam(), bits(row, i)); }
  oracle::Row values(const Bytes& row) const {
    oracle::Row result;
    for (size_t i = 0; i < row.size() / width(); ++i) result.push_back(value(row, i));
    return result;
  }
  /// A row of the given numbers, which the type must hold exactly.
  Bytes row_of(const oracle::Row& numbers) const {
    Bytes row(numbers.size() * width());
    oracle::store(GetParam(), numbers, row.data());
    return row;
  }
  /// Numbers of all magnitudes of the type, or with `close` of similar ones, where sums have to round.
  Bytes random_row(std::mt19937_64& random, size_t elements, bool close) const {
    Bytes row(elements * width());
    for (size_t i = 0; i < elements; ++i) {
      uint32_t chosen = static_cast<uint32_t>(random()) & (width() == 2 ? 0xFFFFu : 0xFFFFFFFFu);
      const float exact = static_cast<float>(static_cast<int32_t>(random() % 8192) - 4096) / 64;
      if (close) chosen = oracle::encode(GetParam(), exact);
      std::memcpy(row.data() + i * width(), &chosen, width());
    }
    return row;
  }
  Bytes sum(const std::vector<Bytes>& rows, const std::vector<float>& weights) const {
    Bytes out(rows.at(0).size());
    std::vector<WeightedRow> terms;
    for (size_t t = 0; t < rows.size(); ++t) terms.push_back({rows[t].data(), weights[t]});
    sum_rows(out.data(), terms, out.size() / width(), GetParam());
    return out;
  }
  oracle::Row expected(const std::vector<Bytes>& rows, const std::vector<float>& weights) const {
    oracle::Terms terms;
    for (size_t t = 0; t < rows.size(); ++t) terms.emplace_back(values(rows[t]), weights[t]);
    return oracle::sum(GetParam(), terms, rows.at(0).size() / width());
  }
  /// Bit by bit, except that any NaN equals any NaN.
  void expect_equal(const Bytes& out, const oracle::Row& want) const {
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isnan(want[i])) {
        ASSERT_TRUE(std::isnan(value(out, i))) << "element " << i << " is " << value(out, i);
      } else {
        ASSERT_EQ(bits(out, i), oracle::encode(GetParam(), want[i]))
            << "element " << i << " is " << value(out, i) << " instead of " << want[i];
      }
    }
  }
  /// The spacing of the type's numbers just above 1.
  float step() const { return std::ldexp(1.0f, -oracle::format_of(GetParam()).fraction_bits); }
};

std::string type_name(const testing::TestParamInfo<ScalarType>& info) {
  return info.param == ScalarType::kBfloat16  ? "Bfloat16"
         : info.param == ScalarType::kFloat16 ? "Float16"
                                              : "Float32";
}

INSTANTIATE_TEST_SUITE_P(Types, RowMath,
                         testing::Values(ScalarType::kBfloat16, ScalarType::kFloat16, ScalarType::kFloat32),
                         type_name);

TEST_P(RowMath, NoTermGivesZeros) {
  Bytes out(7 * width(), std::byte{0xAB});
  sum_rows(out.data(), {}, 6, GetParam());
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(bits(out, i), 0u);
  EXPECT_EQ(out.back(), std::byte{0xAB});
}

// Also of numbers that arithmetic would change, such as signalling NaNs.
TEST_P(RowMath, ASingleTermOfWeightOneIsCopiedBitForBit) {
  Bytes row;
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const uint32_t bits = width() == 2 ? pattern : pattern << 16 | pattern;
    for (size_t i = 0; i < width(); ++i) row.push_back(std::byte(bits >> 8 * i));
  }
  EXPECT_EQ(sum({row}, {1.0f}), row);
}

// Every number of the 16-bit types is the exact result of a sum: nothing may change it.
TEST_P(RowMath, ExactSumsStayExact) {
  Bytes row;
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const uint32_t bits = width() == 2 ? pattern : pattern << 16;
    for (size_t i = 0; i < width(); ++i) row.push_back(std::byte(bits >> 8 * i));
  }
  const Bytes minus_zero = row_of(oracle::Row(0x10000, -0.0f));
  expect_equal(sum({row, minus_zero}, {1.0f, 1.0f}), values(row));
  expect_equal(sum({minus_zero, row}, {1.0f, 1.0f}), values(row));
}

TEST_P(RowMath, TiesGoToEven) {
  const float half = step() / 2;
  const Bytes one = row_of({1, 1 + step(), 1, 1 + step(), 1 + 2 * step(), -1, -1 - step()});
  const Bytes more = row_of({half, half, half, -half, -half, -half, -half});
  const float up = 1 + 2 * step();
  expect_equal(sum({one, more}, {1.0f, 1.0f}), {1, up, 1, 1, up, -1, -up});
}

TEST_P(RowMath, JustBesideATieIsNotATie) {
  const float half = step() / 2;
  const float bit = GetParam() == ScalarType::kFloat32 ? 0 : std::ldexp(1.0f, -23);
  const Bytes one = row_of({1, 1});
  // In float32 there is nothing finer than a step to be lost.
  const Bytes halves = row_of({half, half});
  const std::vector<float> weights = {1.0f, 1.0f};
  if (bit == 0) return expect_equal(sum({one, halves}, weights), {1, 1});
  const Bytes bits = row_of({bit, -bit});
  expect_equal(sum({one, halves, bits}, {1.0f, 1.0f, 1.0f}), {1 + step(), 1});
}

TEST_P(RowMath, RoundsOnlyOnce) {
  // Each summand alone would be rounded away; together they count.
  const float quarter = step() / 4;
  const Bytes one = row_of({1});
  const Bytes small = row_of({quarter});
  const bool narrow = GetParam() != ScalarType::kFloat32;
  const std::vector<Bytes> rows = {one, small, small, small};
  EXPECT_EQ(value(sum(rows, {1, 1, 1, 1}), 0), narrow ? 1 + step() : 1);
}

TEST_P(RowMath, SumsInTheOrderOfTheTerms) {
  // 2^24 + 1 is not a float32, so the order of these three terms shows.
  const float big = GetParam() == ScalarType::kFloat16 ? 4096 : 16777216;
  const float weight = 16777216 / big;
  const Bytes row = row_of({big});
  const Bytes one = row_of({1});
  const Bytes minus = row_of({-big});
  EXPECT_EQ(value(sum({row, one, minus}, {weight, 1, weight}), 0), 0);
  EXPECT_EQ(value(sum({row, minus, one}, {weight, weight, 1}), 0), 1);
  EXPECT_EQ(value(sum({one, row, minus}, {1, weight, weight}), 0), 0);
}

TEST_P(RowMath, InfinitiesAndNaNs) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Bytes a = row_of({kInfinity, -kInfinity, kInfinity, nan, 1, 0});
  const Bytes b = row_of({1, 1, -kInfinity, 1, nan, kInfinity});
  expect_equal(sum({a, b}, {1, 1}), {kInfinity, -kInfinity, nan, nan, nan, kInfinity});
  EXPECT_TRUE(std::isnan(value(sum({a, b}, {1, 0}), 5)));  // 0 * infinity
  // Also a NaN whose fraction would overflow if it were rounded like a number's.
  for (const uint32_t bits : {0x7FFFFFFFu, 0xFFFFFFFFu, 0x7F800001u}) {
    EXPECT_TRUE(std::isnan(value(sum({a}, {std::bit_cast<float>(bits)}), 4)));
  }
}

TEST_P(RowMath, OverflowGivesInfinity) {
  const oracle::Format format = oracle::format_of(GetParam());
  const float largest = static_cast<float>(
      std::ldexp(2.0 - std::ldexp(1.0, -format.fraction_bits), format.exponent_mask() - 1 - format.bias()));
  const float last_place = std::ldexp(1.0f, std::ilogb(largest) - format.fraction_bits);
  const Bytes a = row_of({largest, -largest, largest, largest});
  const Bytes b = row_of({largest, -largest, last_place / 2, last_place / 4});
  expect_equal(sum({a, b}, {1, 1}), {kInfinity, -kInfinity, kInfinity, largest});
}

TEST_P(RowMath, SubnormalsAreKept) {
  const oracle::Format format = oracle::format_of(GetParam());
  const float smallest = std::ldexp(1.0f, format.smallest_exponent() - format.fraction_bits);
  const float normal = std::ldexp(1.0f, format.smallest_exponent());
  const Bytes a = row_of({smallest, normal, smallest, 3 * smallest, -smallest});
  const Bytes b = row_of({smallest, -smallest, -smallest, 0, -smallest});
  expect_equal(sum({a, b}, {1, 1}), {2 * smallest, normal - smallest, 0, 3 * smallest, -2 * smallest});
  // A half of the smallest number ties to zero, and one and a half to two.
  expect_equal(sum({a}, {0.5f}), expected({a}, {0.5f}));
  EXPECT_EQ(value(sum({a}, {0.5f}), 0), 0);
  EXPECT_EQ(value(sum({a}, {0.5f}), 3), 2 * smallest);
}

TEST_P(RowMath, MinusZeroIsKept) {
  const Bytes zeros = row_of({-0.0f, -0.0f, 0.0f, 1});
  const Bytes others = row_of({-0.0f, 0.0f, 0.0f, -1});
  expect_equal(sum({zeros}, {1}), {-0.0f, -0.0f, 0.0f, 1});
  expect_equal(sum({zeros, others}, {1, 1}), {-0.0f, 0.0f, 0.0f, 0.0f});
  expect_equal(sum({zeros}, {2}), {-0.0f, -0.0f, 0.0f, 2});
}

TEST_P(RowMath, RandomSums) {
  const uint64_t seed = test_seed(21);
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> weight(-2.0f, 2.0f);
  for (const bool close : {true, false}) {
    for (uint32_t count = 1; count <= 32; ++count) {
      std::vector<Bytes> rows;
      std::vector<float> weights;
      for (uint32_t t = 0; t < count; ++t) {
        rows.push_back(random_row(random, 257, close));
        weights.push_back(random() % 2 == 0 ? 1.0f : weight(random));
      }
      expect_equal(sum(rows, weights), expected(rows, weights));
    }
  }
}

// An element depends on nothing but its column: every length gives a prefix of the longest row, and nothing
// beyond the row is touched.
TEST_P(RowMath, EveryLength) {
  const uint64_t seed = test_seed(22);
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  std::mt19937_64 random(seed);
  constexpr size_t kLongest = 2100;
  const std::vector<Bytes> rows = {random_row(random, kLongest, true), random_row(random, kLongest, true),
                                   random_row(random, kLongest, true)};
  const std::vector<float> weights = {1.0f, 0.75f, -1.25f};
  Bytes want(kLongest * width());
  oracle::store(GetParam(), expected(rows, weights), want.data());
  std::vector<WeightedRow> terms;
  for (size_t t = 0; t < rows.size(); ++t) terms.push_back({rows[t].data(), weights[t]});
  for (size_t elements = 0; elements <= kLongest; ++elements) {
    Bytes out(elements * width() + 64, std::byte{0x5A});
    sum_rows(out.data(), terms, elements, GetParam());
    const size_t bytes = elements * width();
    ASSERT_EQ(std::memcmp(out.data(), want.data(), bytes), 0) << elements << " elements";
    ASSERT_TRUE(std::all_of(out.begin() + bytes, out.end(), [](auto b) { return b == std::byte{0x5A}; }));
  }
}

TEST_P(RowMath, TheResultMayReplaceAnyTerm) {
  const uint64_t seed = test_seed(23);
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  std::mt19937_64 random(seed);
  constexpr size_t kElements = 1500;  // more than one block of the implementation
  for (uint32_t count = 1; count <= 4; ++count) {
    for (uint32_t replaced = 0; replaced < count; ++replaced) {
      std::vector<Bytes> rows;
      std::vector<float> weights(count, count == 1 ? 1.0f : 0.5f);
      for (uint32_t t = 0; t < count; ++t) rows.push_back(random_row(random, kElements, true));
      const oracle::Row want = expected(rows, weights);
      std::vector<WeightedRow> terms;
      for (uint32_t t = 0; t < count; ++t) terms.push_back({rows[t].data(), weights[t]});
      sum_rows(rows[replaced].data(), terms, kElements, GetParam());
      expect_equal(rows[replaced], want);
    }
  }
}

}  // namespace
}  // namespace efa_ep
