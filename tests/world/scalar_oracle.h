// What row sums must be, one number at a time, from the formats' definitions and without bit tricks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/row_math.h"

namespace efa_ep::oracle {

/// A binary interchange format: sign, exponent, fraction.
struct Format {
  int exponent_bits;
  int fraction_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int smallest_exponent() const { return 1 - bias(); }
  uint32_t exponent_mask() const { return (1u << exponent_bits) - 1; }
};

Format format_of(ScalarType type);

/// The number that `bits` stand for. Every number of the three formats is a float.
float decode(ScalarType type, uint32_t bits);

/// The nearest number of the format, ties to the even fraction, as bits.
uint32_t encode(ScalarType type, float value);

using Row = std::vector<float>;
using Terms = std::vector<std::pair<Row, float>>;  // rows and their weights

/// sum_rows() by its definition: products and sums rounded to float32 one by one, in the order of the terms,
/// and the total rounded once to `type`. long double holds every float product and sum closely enough that
/// the second rounding changes nothing.
Row sum(ScalarType type, const Terms& terms, size_t elements);

uint32_t load_bits(ScalarType type, const std::byte* from);

void store(ScalarType type, const Row& row, std::byte* to);

}  // namespace efa_ep::oracle
