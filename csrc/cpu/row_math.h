// Sums of rows: the only arithmetic of the CPU device.
#pragma once

#include <cstddef>
#include <span>

#include "protocol/scalar_type.h"

namespace efa_ep {

/// One summand of a row sum.
struct WeightedRow {
  const std::byte* row = nullptr;
  float weight = 1.0f;
};

/// out[i] = sum over terms, in their order, of weight * row[i], in float32, rounded once (to nearest, ties to
/// even). `out` may be one of the rows. No term gives zeros; a single term of weight 1 is a copy, bit for
/// bit. Every CPU gives the same bits.
void sum_rows(std::byte* out, std::span<const WeightedRow> terms, size_t elements, ScalarType type);

}  // namespace efa_ep
