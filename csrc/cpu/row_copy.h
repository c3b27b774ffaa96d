// Copies of rows, through the caches or past them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace efa_ep {

/// Whether what is written goes through the caches, where the next reader finds it, or straight to memory:
/// cheaper when so much is written that it would push itself out before anybody reads it, since the processor
/// need not fetch what it is about to overwrite. Only x86-64 can; elsewhere all copies go through the caches.
enum class Caching : uint8_t { kThrough, kPast };

/// Copies `bytes` bytes between places that do not overlap. Past the caches both must be multiples of 16, and
/// other threads see the copy, as any other, with what this thread releases afterwards.
void copy_row(std::byte* to, const std::byte* from, size_t bytes, Caching caching);

}  // namespace efa_ep
