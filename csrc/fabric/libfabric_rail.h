// One network interface: its libfabric objects, registered memory, peers, and the writes in flight on it.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "fabric/fabric.h"
#include "fabric/libfabric_address.h"
#include "fabric/libfabric_provider.h"
#include "fabric/stream_window.h"

namespace efa_ep {

/// Closes a libfabric object. Objects must go before those they were made from or bound to.
struct FidCloser {
  template <typename Object>
  void operator()(Object* object) const {
    fi_close(&object->fid);
  }
};
template <typename Object>
using FidPtr = std::unique_ptr<Object, FidCloser>;

class LibfabricRail {
 public:
  /// Opens an endpoint on the interface that `info` describes, with room for `peers` peers. `index` is the
  /// rail's number in error texts. Throws FabricUnavailableError.
  LibfabricRail(InfoPtr info, uint32_t index, uint32_t peers);

  const char* nic() const { return info_->domain_attr->name; }
  uint32_t address_format() const { return info_->addr_format; }
  uint32_t send_queue_depth() const { return static_cast<uint32_t>(writes_.size()); }
  uint32_t completion_queue_depth() const { return completion_queue_depth_; }
  uint64_t max_write_bytes() const { return max_write_bytes_; }
  bool honours_fence() const { return (info_->caps & FI_FENCE) != 0; }

  void register_memory(std::byte* base, size_t bytes);
  void register_device_memory(const DeviceRange& range);
  RailAddress address() const;
  void connect(uint32_t peer, const RailAddress& address, uint64_t memory_bytes);
  PostResult post_write(const WriteRequest& request);
  size_t poll(std::span<Completion> completions);

 private:
  /// A write from post to completion. libfabric owns `provider_context` meanwhile.
  struct Write {
    fi_context2 provider_context;
    uint64_t context;
    uint64_t covered_bytes;  // by its completion, in the peer's window
    uint32_t peer;
    bool in_flight;
  };
  struct Peer {
    fi_addr_t address = FI_ADDR_UNSPEC;
    uint64_t base = 0;
    uint64_t memory_bytes = 0;
    std::vector<uint64_t> keys;
    StreamWindow window;  // used if the provider has streams
  };

  void open_endpoint(uint32_t peers);
  void set_endpoint_options();
  void prepare_receives();
  void post_receives();
  FidPtr<fid_mr> register_piece(void* base, size_t bytes, uint64_t access, uint64_t key) const;
  FidPtr<fid_mr> register_device_piece(const DeviceRange& range, uint64_t piece) const;
  Peer& target_of(const WriteRequest& request);
  bool is_receive(const void* context) const;
  Write* write_of(void* context);
  void release(Write& write);
  Completion completion_of(const fi_cq_data_entry& entry);
  size_t read_error(Completion& completion);
  std::string name() const;
  std::string peer_name(uint32_t peer) const;

  // In the order of creation: destruction in reverse closes the endpoint first.
  InfoPtr info_;
  uint32_t index_;
  uint64_t first_key_;
  uint32_t completion_queue_depth_ = 0;
  uint64_t max_write_bytes_ = 0;
  bool has_streams_ = false;
  std::vector<Write> writes_;
  std::vector<Write*> free_writes_;
  // Only for devices on which an immediate consumes a posted receive (FI_RX_CQ_DATA).
  std::vector<fi_context2> receives_;
  std::vector<fi_context2*> free_receives_;
  std::unique_ptr<std::byte[]> receive_buffer_;

  std::byte* memory_ = nullptr;
  size_t memory_bytes_ = 0;
  std::vector<Peer> peers_;  // by rank

  FidPtr<fid_fabric> fabric_;
  FidPtr<fid_domain> domain_;
  FidPtr<fid_av> address_vector_;
  FidPtr<fid_cq> completion_queue_;
  FidPtr<fid_mr> receive_region_;
  std::vector<FidPtr<fid_mr>> pieces_;
  FidPtr<fid_ep> endpoint_;
};

}  // namespace efa_ep
