// Block-wise quantisation of rows on the CPU: the codes of csrc/cuda/quantise.cuh, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/quantisation.h"

namespace efa_ep {

/// Makes `values` codes, a multiple of kScaleGroup, and a scale per group: float32, or one ue8m0 byte for
/// kFp8Ue8m0. Numbers that are not become 0x7F, the code that is not a number.
void quantise_row(const std::byte* bf16, uint32_t values, Quantisation kind, std::byte* codes,
                  std::byte* scales);

}  // namespace efa_ep
