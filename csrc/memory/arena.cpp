#include "memory/arena.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "errors.h"

namespace efa_ep {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

ConfigurationError failure(const std::string& what, size_t bytes) {
  return ConfigurationError(
      what + " of " + std::to_string(bytes) + " bytes failed: " + std::generic_category().message(errno) +
      "; lower max_tokens_per_rank, or raise the memory limit of this process or container");
}

// Returns nullptr where the system cannot give the pages.
std::byte* map_shared(int descriptor, size_t bytes) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  return address == MAP_FAILED ? nullptr : static_cast<std::byte*>(address);
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // glibc has it from 2.35
#endif

// Whether all pages are there. Containers have limits on huge pages that count when a page is touched, not
// when it is mapped, and one too many would kill the process.
bool touch_pages(std::byte* data, size_t bytes) {
  return madvise(data, bytes, MADV_POPULATE_WRITE) == 0 || errno == EINVAL;  // as Linux before 5.14 says
}

}  // namespace

Arena Arena::create(size_t bytes) {
  const size_t size = allocated_bytes(bytes);
  for (const bool huge : {true, false}) {
    const int descriptor = memfd_create(
        "efa_ep_arena", MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0u));
    if (descriptor < 0) {
      if (huge) continue;
      throw failure("creating shared memory", size);
    }
    // Sealed, since reading memory that its owner cut short would kill the reader.
    const bool sized =
        ftruncate(descriptor, static_cast<off_t>(size)) == 0 && fcntl(descriptor, F_ADD_SEALS, kSeals) == 0;
    std::byte* data = sized ? map_shared(descriptor, size) : nullptr;
    if (data != nullptr && huge && !touch_pages(data, size)) {
      munmap(data, size);
      data = nullptr;
    }
    if (data != nullptr) {
      if (!huge) madvise(data, size, MADV_HUGEPAGE);
      return Arena(data, size, descriptor, huge);
    }
    const ConfigurationError error = failure("mapping shared memory", size);
    close(descriptor);
    if (!huge) throw error;
  }
  throw failure("mapping shared memory", size);
}

Arena Arena::map(int descriptor, size_t bytes) {
  const size_t size = allocated_bytes(bytes);
  struct stat status{};
  if (fstat(descriptor, &status) != 0) throw failure("inspecting a peer's shared memory", size);
  if (static_cast<size_t>(status.st_size) < size) {
    throw ConfigurationError("a local peer's shared memory has " + std::to_string(status.st_size) +
                             " bytes, but " + std::to_string(size) +
                             " are needed; start all ranks with the same configuration");
  }
  const int seals = fcntl(descriptor, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw ConfigurationError(
        "a local peer's shared memory can shrink under its readers (no F_SEAL_SHRINK); it was not made by "
        "this "
        "package: start all ranks with the same version");
  }
  std::byte* data = map_shared(descriptor, size);
  if (data == nullptr) throw failure("mapping a peer's shared memory", size);
  return Arena(data, size, -1, false);
}

Arena::Arena(Arena&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(other.bytes_),
      descriptor_(std::exchange(other.descriptor_, -1)),
      huge_pages_(other.huge_pages_) {}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

}  // namespace efa_ep
