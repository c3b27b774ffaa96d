// The memory that peers and NICs write: one region per rank, backed by a file descriptor that local ranks
// map.
#pragma once

#include <cstddef>

namespace efa_ep {

/// A shared memory region. It has no name in any file system, so nothing is left behind by a killed process.
class Arena {
 public:
  /// Every arena is a multiple of this, so that it can lie in huge pages.
  static constexpr size_t kGranularity = size_t{2} << 20;
  static constexpr size_t allocated_bytes(size_t bytes) {
    return (bytes + kGranularity - 1) / kGranularity * kGranularity;
  }

  /// Creates a zero-filled region of allocated_bytes(bytes), in 2 MiB pages if the system has enough
  /// reserved. Throws ConfigurationError naming the size and the system's reason.
  static Arena create(size_t bytes);

  /// Maps the region behind a file descriptor received from a local peer. The descriptor stays the caller's.
  /// Throws ConfigurationError if the region is smaller than `bytes`, or could become so.
  static Arena map(int descriptor, size_t bytes);

  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;
  ~Arena();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  /// The descriptor to pass to local peers; -1 for a mapped region.
  int descriptor() const { return descriptor_; }
  bool huge_pages() const { return huge_pages_; }

 private:
  Arena(std::byte* data, size_t bytes, int descriptor, bool huge_pages)
      : data_(data), bytes_(bytes), descriptor_(descriptor), huge_pages_(huge_pages) {}

  std::byte* data_;
  size_t bytes_;
  int descriptor_;
  bool huge_pages_;
};

}  // namespace efa_ep
