// Element type of combine rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace efa_ep {

enum class ScalarType : uint8_t { kBfloat16, kFloat16, kFloat32 };

constexpr size_t scalar_bytes(ScalarType type) { return type == ScalarType::kFloat32 ? 4 : 2; }

}  // namespace efa_ep
