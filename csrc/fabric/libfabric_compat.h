// Values and fields of newer libfabric releases, so that a build with old headers (1.17) uses them on a new
// library.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>

#include <cstddef>
#include <cstdint>

namespace efa_ep::libfabric_compat {

// Endpoint options (FI_OPT_*); a library that does not know one answers with an error.
inline constexpr int kOptCudaApiPermitted = 10;                ///< 1.18, bool
inline constexpr int kOptSharedMemoryPermitted = 11;           ///< 1.21, bool
inline constexpr int kOptMaxRmaSize = 14;                      ///< 1.22, size_t
inline constexpr int kOptEfaHomogeneousPeers = 7 - 0xefa0000;  ///< 2.2, bool

/// FI_PROGRESS_CONTROL_UNIFIED, since 1.22: control and data calls come from one thread, so no locks are
/// needed.
inline constexpr auto kProgressControlUnified = static_cast<fi_progress>(3);
inline constexpr uint32_t kProgressControlUnifiedSince = FI_VERSION(1, 22);

/// fi_mr_dmabuf, and the flag of fi_mr_regattr that says that attr.dmabuf, in the place of attr.mr_iov,
/// points to one. The region's addresses start at base_addr + offset.
struct MrDmabuf {
  int fd;
  uint64_t offset;
  size_t len;
  void* base_addr;
};
inline constexpr uint64_t kMrDmabuf = uint64_t{1} << 40;
inline constexpr uint32_t kMrDmabufSince = FI_VERSION(1, 20);

/// fi_mr_attr with room for the fields that newer libraries read behind it; zero means "not used".
struct MrAttr {
  fi_mr_attr attr{};
  std::byte newer_fields[64]{};
};

/// fi_cq_err_entry with room for the fields that newer libraries write behind it.
struct CqErrEntry {
  fi_cq_err_entry entry{};
  std::byte newer_fields[64]{};
};

}  // namespace efa_ep::libfabric_compat
