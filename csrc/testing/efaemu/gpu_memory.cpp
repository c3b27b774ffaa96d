#include "testing/efaemu/gpu_memory.h"

#include <rdma/fi_errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "fabric/libfabric_compat.h"

namespace efaemu {
namespace {

using efa_ep::libfabric_compat::kMrDmabuf;
using efa_ep::libfabric_compat::MrDmabuf;

/// Whether byte `offset` of the file is what this process has mapped at `address`.
bool is_mapped(uintptr_t address, ino_t file, uint64_t offset) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    uintptr_t start = 0, end = 0;
    uint64_t file_offset = 0, inode = 0;
    std::string rights, device;
    char dash = 0;
    fields >> std::hex >> start >> dash >> end >> rights >> file_offset >> device >> std::dec >> inode;
    if (address >= start && address < end) return inode == file && address - start + file_offset == offset;
  }
  return false;
}

}  // namespace

int find_gpu_memory(const fi_mr_attr& attributes, uint64_t flags, iovec& range) {
  if (!(flags & kMrDmabuf)) {
    const char* peer_memory = std::getenv("EFAEMU_PEER_MEMORY");
    if (peer_memory == nullptr || std::strcmp(peer_memory, "1") != 0) return -FI_EFAULT;
    range = attributes.mr_iov[0];
    return 0;
  }
  MrDmabuf dmabuf{};
  std::memcpy(&dmabuf, attributes.mr_iov, sizeof dmabuf);
  struct stat status{};
  if (fstat(dmabuf.fd, &status) != 0) return -FI_EBADF;
  const auto size = static_cast<uint64_t>(status.st_size);
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (dmabuf.offset % page != 0 || dmabuf.len == 0) return -FI_EINVAL;
  if (dmabuf.offset > size || dmabuf.len > size - dmabuf.offset) return -FI_EINVAL;
  auto* first = static_cast<std::byte*>(dmabuf.base_addr) + dmabuf.offset;
  const auto address = reinterpret_cast<uintptr_t>(first);
  if (!is_mapped(address, status.st_ino, dmabuf.offset)) return -FI_EFAULT;
  if (!is_mapped(address + dmabuf.len - 1, status.st_ino, dmabuf.offset + dmabuf.len - 1)) return -FI_EFAULT;
  range = {first, dmabuf.len};
  return 0;
}

}  // namespace efaemu
