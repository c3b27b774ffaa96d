// Block-shared memory: an arena per block, filled with 0xCD (never zero by luck), with red zones
// between variables that ASan knows about.
#include <algorithm>
#include <cstring>

#include "engine/state.h"

namespace simt {

namespace {

constexpr size_t kMinAlign = 128;
constexpr int kFill = 0xCD;

std::byte* arena(Block* b) {
  auto& arena = b->shared.arena;
  if (!arena) {
    arena.reset(new std::byte[kArenaBytes]);
    std::memset(arena.get(), kFill, kArenaBytes);
    if (g_asan) __asan_poison_memory_region(arena.get(), kArenaBytes);
  }
  return arena.get();
}

void* allocate(Block* b, size_t bytes, size_t align) {
  SharedMemory& s = b->shared;
  const auto base = reinterpret_cast<uintptr_t>(arena(b));
  const uintptr_t address = (base + s.offset + align - 1) & ~(align - 1);
  s.used += bytes;
  s.offset = address - base + bytes + kRedZone;
  if (s.used > kSharedMemoryLimit || s.offset > kArenaBytes) {
    die("shared memory over %zu bytes", kSharedMemoryLimit);
  }
  void* p = reinterpret_cast<void*>(address);
  if (g_asan) __asan_unpoison_memory_region(p, bytes);
  return p;
}

}  // namespace

void* shared_alloc(const void* key, size_t bytes, size_t align) {
  QuietScope quiet;
  Block* b = current_block();
  for (const auto& [known_key, p] : b->shared.variables) {
    if (known_key == key) return p;
  }
  void* p = allocate(b, bytes, std::max(align, kMinAlign));
  b->shared.variables.emplace_back(key, p);
  return p;
}

std::byte* shared_window() {
  QuietScope quiet;
  return arena(current_block());
}

bool is_shared(const void* p) {
  const std::byte* window = shared_window();
  return p >= window && p < window + kArenaBytes;
}

void release_shared_memory(Block* b) {
  if (g_asan && b->shared.arena) __asan_unpoison_memory_region(b->shared.arena.get(), kArenaBytes);
  b->shared.arena.reset();
}

}  // namespace simt
