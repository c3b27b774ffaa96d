#include "scalar_oracle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace efa_ep::oracle {

Format format_of(ScalarType type) {
  switch (type) {
    case ScalarType::kBfloat16:
      return {8, 7};
    case ScalarType::kFloat16:
      return {5, 10};
    default:
      return {8, 23};
  }
}

float decode(ScalarType type, uint32_t bits) {
  const Format format = format_of(type);
  const uint32_t fraction = bits & ((1u << format.fraction_bits) - 1);
  const uint32_t exponent = bits >> format.fraction_bits & format.exponent_mask();
  const bool negative = bits >> (format.fraction_bits + format.exponent_bits) != 0;
  double value;
  if (exponent == format.exponent_mask()) {
    value =
        fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(fraction, format.smallest_exponent() - format.fraction_bits);
  } else {
    value = std::ldexp(fraction + std::ldexp(1.0, format.fraction_bits),
                       static_cast<int>(exponent) - format.bias() - format.fraction_bits);
  }
  return static_cast<float>(negative ? -value : value);
}

uint32_t encode(ScalarType type, float value) {
  const Format format = format_of(type);
  const uint32_t sign = std::signbit(value) ? 1u << (format.exponent_bits + format.fraction_bits) : 0;
  const uint32_t infinity = format.exponent_mask() << format.fraction_bits;
  if (std::isnan(value)) return sign | infinity | 1u << (format.fraction_bits - 1);
  if (std::isinf(value)) return sign | infinity;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), format.smallest_exponent());
  // In units of the last place; a carry out of the fraction runs into the exponent field, as it should.
  const double units = std::nearbyint(std::ldexp(magnitude, format.fraction_bits - exponent));
  const auto field = static_cast<uint64_t>(exponent - format.smallest_exponent()) << format.fraction_bits;
  return sign | static_cast<uint32_t>(std::min<uint64_t>(field + static_cast<uint64_t>(units), infinity));
}

Row sum(ScalarType type, const Terms& terms, size_t elements) {
  Row result(elements, 0.0f);
  if (terms.size() == 1 && terms[0].second == 1.0f) return terms[0].first;
  for (size_t i = 0; i < elements && !terms.empty(); ++i) {
    const auto product = [&](size_t t) {
      return static_cast<float>(static_cast<long double>(terms[t].second) * terms[t].first[i]);
    };
    float total = product(0);
    for (size_t t = 1; t < terms.size(); ++t) {
      total = static_cast<float>(static_cast<long double>(total) + product(t));
    }
    result[i] = decode(type, encode(type, total));
  }
  return result;
}

uint32_t load_bits(ScalarType type, const std::byte* from) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, scalar_bytes(type));  // little-endian, like the formats in memory here
  return bits;
}

void store(ScalarType type, const Row& row, std::byte* to) {
  for (size_t i = 0; i < row.size(); ++i) {
    const uint32_t bits = encode(type, row[i]);
    std::memcpy(to + i * scalar_bytes(type), &bits, scalar_bytes(type));
  }
}

}  // namespace efa_ep::oracle
