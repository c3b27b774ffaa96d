// Endpoints and completion queues under EFA's rules.
#pragma once

#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>

namespace efaemu {

/// What efa-direct grants to sends; to RDMA writes it grants nothing.
inline constexpr size_t kInjectBytes = 32;
inline constexpr size_t kCqDataBytes = 4;
inline constexpr size_t kMaxMessageBytes = size_t{1} << 30;

/// Writes an endpoint may have between post and completion ($EFAEMU_DEPTH).
size_t send_queue_depth();
/// Whether arriving immediates need no posted receive ($EFAEMU_UNSOLICITED, 0 or 1).
bool unsolicited_writes();

/// True if `descriptor` belongs to a registration of this domain that holds these bytes.
bool is_registered(fid_domain& domain, const void* descriptor, const void* base, size_t bytes);

void interpose(fid_ep& endpoint, fid_domain& domain, bool needs_receives);
void interpose(fid_cq& queue);

}  // namespace efaemu
