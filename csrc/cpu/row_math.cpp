#include "cpu/row_math.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

// One build for every x86-64, with the widest vectors of the CPU chosen at load time. Sanitizers instrument
// the resolvers that choose, before their own run time is up, so their builds have the baseline only.
#if defined(__x86_64__) && !defined(EFA_EP_SANITIZED)
#define EFA_EP_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EFA_EP_VECTORISED
#endif
#define EFA_EP_INLINE inline __attribute__((always_inline))

namespace efa_ep {
namespace {

struct Bfloat16 {
  using Bits = uint16_t;
  static EFA_EP_INLINE float load(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static EFA_EP_INLINE uint16_t store(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const uint32_t quiet_nan = bits >> 16 | 0x40u;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
  }
};
struct Float16 {
  using Bits = _Float16;
  static EFA_EP_INLINE float load(_Float16 value) { return static_cast<float>(value); }
  static EFA_EP_INLINE _Float16 store(float value) { return static_cast<_Float16>(value); }
};
struct Float32 {
  using Bits = float;
  static EFA_EP_INLINE float load(float value) { return value; }
  static EFA_EP_INLINE float store(float value) { return value; }
};

// With few terms every element is summed in registers: up to five times as fast as sums kept in memory when
// the rows lie whole pages apart.
template <class Type, size_t... Term>
EFA_EP_INLINE void sum_few(std::byte* out, const WeightedRow* terms, size_t elements,
                           std::index_sequence<Term...>) {
  using Bits = typename Type::Bits;
  const std::array rows = {reinterpret_cast<const Bits*>(terms[Term].row)...};
  const std::array weights = {terms[Term].weight...};
  Bits* result = reinterpret_cast<Bits*>(out);
  for (size_t i = 0; i < elements; ++i) {
    float total = weights[0] * Type::load(rows[0][i]);
    ((Term > 0 ? void(total += weights[Term] * Type::load(rows[Term][i])) : void()), ...);
    result[i] = Type::store(total);
  }
}

// With many, block by block, so that the float32 sums stay in the first-level cache however long the row is.
template <class Type>
EFA_EP_INLINE void sum_many(std::byte* out, const WeightedRow* terms, size_t count, size_t elements) {
  using Bits = typename Type::Bits;
  constexpr size_t kBlock = 1024;
  float total[kBlock];
  for (size_t start = 0; start < elements; start += kBlock) {
    const size_t n = std::min(kBlock, elements - start);
    const Bits* first = reinterpret_cast<const Bits*>(terms[0].row) + start;
    for (size_t i = 0; i < n; ++i) total[i] = terms[0].weight * Type::load(first[i]);
    for (size_t t = 1; t < count; ++t) {
      const Bits* row = reinterpret_cast<const Bits*>(terms[t].row) + start;
      const float weight = terms[t].weight;
      for (size_t i = 0; i < n; ++i) total[i] += weight * Type::load(row[i]);
    }
    Bits* result = reinterpret_cast<Bits*>(out) + start;
    for (size_t i = 0; i < n; ++i) result[i] = Type::store(total[i]);
  }
}

template <class Type, size_t Terms = 1>
EFA_EP_INLINE void sum(std::byte* out, const WeightedRow* terms, size_t count, size_t elements) {
  constexpr size_t kFew = 8;
  if constexpr (Terms <= kFew) {
    if (count > Terms) return sum<Type, Terms + 1>(out, terms, count, elements);
    return sum_few<Type>(out, terms, elements, std::make_index_sequence<Terms>());
  } else {
    return sum_many<Type>(out, terms, count, elements);
  }
}

EFA_EP_VECTORISED void sum_bfloat16(std::byte* out, const WeightedRow* terms, size_t count, size_t elements) {
  sum<Bfloat16>(out, terms, count, elements);
}
EFA_EP_VECTORISED void sum_float16(std::byte* out, const WeightedRow* terms, size_t count, size_t elements) {
  sum<Float16>(out, terms, count, elements);
}
EFA_EP_VECTORISED void sum_float32(std::byte* out, const WeightedRow* terms, size_t count, size_t elements) {
  sum<Float32>(out, terms, count, elements);
}

}  // namespace

void sum_rows(std::byte* out, std::span<const WeightedRow> terms, size_t elements, ScalarType type) {
  const size_t bytes = elements * scalar_bytes(type);
  if (terms.empty()) {
    std::memset(out, 0, bytes);
    return;
  }
  if (terms.size() == 1 && terms[0].weight == 1.0f) {
    if (out != terms[0].row) std::memcpy(out, terms[0].row, bytes);
    return;
  }
  switch (type) {
    case ScalarType::kBfloat16:
      return sum_bfloat16(out, terms.data(), terms.size(), elements);
    case ScalarType::kFloat16:
      return sum_float16(out, terms.data(), terms.size(), elements);
    case ScalarType::kFloat32:
      return sum_float32(out, terms.data(), terms.size(), elements);
  }
}

}  // namespace efa_ep
