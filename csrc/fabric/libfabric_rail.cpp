#include "fabric/libfabric_rail.h"

#include <rdma/fi_cm.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>

#include "errors.h"
#include "fabric/libfabric_compat.h"

namespace efa_ep {
namespace {

/// Room in the completion queue for arrivals: what libfabric's EFA provider reserves by default, or this many
/// per peer if that is more. EFA does not protect a completion queue from overrunning, so the proxy sees to
/// it that no more can arrive (protocol/arrivals.h); ranks compute with the same room, whatever their send
/// queues.
constexpr uint32_t kDefaultArrivals = 8192;
constexpr uint32_t kArrivalsPerPeer = 64;

/// Longest provider endpoint name (EFA 32 bytes, IPv6 28).
constexpr size_t kMaxEndpointName = 256;

constexpr size_t kReceiveBufferBytes = 64;
constexpr size_t kPollBatch = 32;

void require(int result, const std::string& call, const std::string& remedy) {
  if (result == 0) return;
  throw FabricUnavailableError(call + " failed: " + libfabric_error(result) + ". " + remedy);
}

constexpr const char* kOpenRemedy =
    "Check `fi_info -v` and `ulimit -l unlimited`, or choose another EFA_EP_PROVIDER.";

template <typename Value>
int set_option(fid_ep* endpoint, int option, Value value) {
  return fi_setopt(&endpoint->fid, FI_OPT_ENDPOINT, option, &value, sizeof value);
}

/// The address family of an IP provider's endpoint name; providers trust it for the length of the name.
sa_family_t address_family(std::span<const std::byte> name) {
  sa_family_t family = 0;
  if (name.size() >= sizeof family) std::memcpy(&family, name.data(), sizeof family);
  return family;
}

// Where the application chooses keys, those of one fabric start here and no other's do: a write to memory
// that was registered before a rank was lost finds no key, not that of what replaced it.
constexpr uint32_t kKeysPerRail = 1 << 16;
uint64_t random_first_key(const fi_info& info) {
  std::random_device random;
  const uint64_t key = (uint64_t{random()} << 32 | random()) * kKeysPerRail;
  const size_t bytes = info.domain_attr->mr_key_size;
  return bytes == 0 || bytes >= sizeof key ? key : key & ((uint64_t{1} << 8 * bytes) - 1);
}

bool outside(uint64_t offset, uint64_t bytes, uint64_t size) {
  return offset > size || bytes > size - offset;
}

}  // namespace

LibfabricRail::LibfabricRail(InfoPtr info, uint32_t index, uint32_t peers)
    : info_(std::move(info)), index_(index), first_key_(random_first_key(*info_)) {
  const std::string provider = info_->fabric_attr->prov_name;
  if (provider == "efa") info_->tx_attr->tclass = FI_TC_LOW_LATENCY;
  if (fi_version() >= libfabric_compat::kProgressControlUnifiedSince) {
    // In the answer instead of the hints: where hints for it go changed between releases.
    info_->domain_attr->control_progress = libfabric_compat::kProgressControlUnified;
  }
  has_streams_ = provider == "tcp" || provider == "net";
  writes_.resize(info_->tx_attr->size);
  for (Write& write : writes_) free_writes_.push_back(&write);
  completion_queue_depth_ = send_queue_depth() + std::max(kDefaultArrivals, kArrivalsPerPeer * peers);
  open_endpoint(peers);
  if ((info_->mode | info_->rx_attr->mode) & FI_RX_CQ_DATA) prepare_receives();
}

void LibfabricRail::open_endpoint(uint32_t peers) {
  fid_fabric* fabric = nullptr;
  require(fi_fabric(info_->fabric_attr, &fabric, nullptr), "fi_fabric on " + name(), kOpenRemedy);
  fabric_.reset(fabric);
  fid_domain* domain = nullptr;
  require(fi_domain(fabric, info_.get(), &domain, nullptr), "fi_domain on " + name(), kOpenRemedy);
  domain_.reset(domain);

  fi_av_attr vector_attributes{};
  vector_attributes.type = FI_AV_TABLE;
  vector_attributes.count = peers;
  fid_av* address_vector = nullptr;
  require(fi_av_open(domain, &vector_attributes, &address_vector, nullptr), "fi_av_open on " + name(),
          kOpenRemedy);
  address_vector_.reset(address_vector);

  fi_cq_attr queue_attributes{};
  queue_attributes.size = completion_queue_depth_;
  queue_attributes.format = FI_CQ_FORMAT_DATA;
  queue_attributes.wait_obj = FI_WAIT_NONE;
  fid_cq* completion_queue = nullptr;
  require(fi_cq_open(domain, &queue_attributes, &completion_queue, nullptr), "fi_cq_open on " + name(),
          kOpenRemedy);
  completion_queue_.reset(completion_queue);

  fid_ep* endpoint = nullptr;
  require(fi_endpoint(domain, info_.get(), &endpoint, nullptr), "fi_endpoint on " + name(), kOpenRemedy);
  endpoint_.reset(endpoint);
  require(fi_ep_bind(endpoint, &address_vector->fid, 0), "fi_ep_bind on " + name(), kOpenRemedy);
  require(fi_ep_bind(endpoint, &completion_queue->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind on " + name(),
          kOpenRemedy);
  set_endpoint_options();
  require(fi_enable(endpoint), "fi_enable on " + name(), kOpenRemedy);
}

void LibfabricRail::set_endpoint_options() {
  using namespace libfabric_compat;
  if (info_->fabric_attr->prov_name == std::string("efa")) {
    // Each saves work on the data path where a release knows it; none changes what is delivered, so a release
    // that does not know one is fine.
    set_option(endpoint_.get(), kOptCudaApiPermitted, false);
    set_option(endpoint_.get(), kOptSharedMemoryPermitted, false);
    set_option(endpoint_.get(), kOptEfaHomogeneousPeers, true);
  }
  size_t limit = 0;
  size_t length = sizeof limit;
  const bool known = fi_getopt(&endpoint_->fid, FI_OPT_ENDPOINT, kOptMaxRmaSize, &limit, &length) == 0;
  max_write_bytes_ = std::min<uint64_t>(known ? limit : info_->ep_attr->max_msg_size, kMaxWriteBytes);
}

void LibfabricRail::prepare_receives() {
  // Nothing is ever sent to these: they are what arriving immediates consume, and all share one small buffer.
  receive_buffer_ = std::make_unique<std::byte[]>(kReceiveBufferBytes);
  // Its key must differ from those of the memory's pieces where the application chooses keys.
  constexpr uint64_t kReceiveKey = kKeysPerRail - 1;
  receive_region_ = register_piece(receive_buffer_.get(), kReceiveBufferBytes, FI_RECV, kReceiveKey);
  receives_.resize(std::min<size_t>(info_->rx_attr->size, completion_queue_depth_ - send_queue_depth()));
  for (fi_context2& receive : receives_) free_receives_.push_back(&receive);
  post_receives();
}

void LibfabricRail::post_receives() {
  while (!free_receives_.empty()) {
    const ssize_t result = fi_recv(endpoint_.get(), receive_buffer_.get(), kReceiveBufferBytes,
                                   fi_mr_desc(receive_region_.get()), FI_ADDR_UNSPEC, free_receives_.back());
    if (result == -FI_EAGAIN) return;  // the next poll tries again
    if (result != 0) throw TransportError("fi_recv on " + name() + " failed: " + libfabric_error(result), -1);
    free_receives_.pop_back();
  }
}

FidPtr<fid_mr> LibfabricRail::register_piece(void* base, size_t bytes, uint64_t access, uint64_t key) const {
  const iovec range{base, bytes};
  libfabric_compat::MrAttr padded;
  padded.attr.mr_iov = &range;
  padded.attr.iov_count = 1;
  padded.attr.access = access;
  padded.attr.requested_key = first_key_ + key;  // ignored by providers that choose keys (FI_MR_PROV_KEY)
  fid_mr* region = nullptr;
  require(fi_mr_regattr(domain_.get(), &padded.attr, 0, &region),
          "registering " + std::to_string(bytes) + " bytes on " + name(),
          "Raise the limit of locked memory (`ulimit -l unlimited`).");
  return FidPtr<fid_mr>(region);
}

FidPtr<fid_mr> LibfabricRail::register_device_piece(const DeviceRange& range, uint64_t piece) const {
  using namespace libfabric_compat;
  const uint64_t start = piece * kPieceStride;
  const uint64_t bytes = std::min<uint64_t>(kMaxPieceBytes, range.bytes - start);
  const iovec addresses{range.base + start, bytes};
  const MrDmabuf dmabuf{.fd = range.dmabuf, .offset = start, .len = bytes, .base_addr = range.base};
  const bool by_dmabuf = range.dmabuf >= 0;
  MrAttr padded;
  // attr.dmabuf, which headers before 1.20 do not have, is a union with attr.mr_iov.
  padded.attr.mr_iov = by_dmabuf ? reinterpret_cast<const iovec*>(&dmabuf) : &addresses;
  padded.attr.iov_count = 1;
  padded.attr.access = FI_WRITE | FI_REMOTE_WRITE;
  padded.attr.requested_key = first_key_ + piece;
  padded.attr.iface = FI_HMEM_CUDA;
  padded.attr.device.cuda = static_cast<int>(range.device);
  fid_mr* region = nullptr;
  require(fi_mr_regattr(domain_.get(), &padded.attr, by_dmabuf ? kMrDmabuf : 0, &region),
          "registering " + std::to_string(bytes) + " bytes of GPU " + std::to_string(range.device) +
              (by_dmabuf ? " by dma-buf" : " by address") + " on " + name(),
          by_dmabuf ? "Check `ulimit -l unlimited`, and that the kernel (5.12 or newer), the EFA driver and "
                      "NVIDIA's open kernel modules support dma-buf."
                    : "The NVIDIA driver exports no dma-buf, so this needs a peer-memory module: load "
                      "efa_nv_peermem or nvidia-peermem, or install NVIDIA's open kernel modules.");
  return FidPtr<fid_mr>(region);
}

void LibfabricRail::register_device_memory(const DeviceRange& range) {
  if ((info_->caps & FI_HMEM) == 0) {
    throw ConfigurationError("the fabric was opened for CPU memory; set LibfabricOptions::device_memory");
  }
  if (range.dmabuf >= 0 && fi_version() < libfabric_compat::kMrDmabufSince) {
    throw FabricUnavailableError(
        "registering GPU memory by dma-buf needs libfabric 1.20, but this one is " +
        std::to_string(FI_MAJOR(fi_version())) + "." + std::to_string(FI_MINOR(fi_version())) +
        "; install the EFA installer's (/opt/amazon/efa), or name a newer one with EFA_EP_LIBFABRIC");
  }
  for (uint64_t piece = 0; piece < piece_count(range.bytes); ++piece)
    pieces_.push_back(register_device_piece(range, piece));
  memory_ = range.base;
  memory_bytes_ = range.bytes;
}

void LibfabricRail::register_memory(std::byte* base, size_t bytes) {
  for (uint64_t piece = 0; piece < piece_count(bytes); ++piece) {
    const uint64_t start = piece * kPieceStride;
    const uint64_t length = std::min<uint64_t>(kMaxPieceBytes, bytes - start);
    pieces_.push_back(register_piece(base + start, length, FI_WRITE | FI_REMOTE_WRITE, piece));
  }
  memory_ = base;
  memory_bytes_ = bytes;
}

RailAddress LibfabricRail::address() const {
  RailAddress address;
  size_t length = kMaxEndpointName;
  address.endpoint_name.resize(length);
  require(fi_getname(&endpoint_->fid, address.endpoint_name.data(), &length), "fi_getname on " + name(),
          kOpenRemedy);
  address.endpoint_name.resize(length);
  if (info_->domain_attr->mr_mode & FI_MR_VIRT_ADDR) address.base = reinterpret_cast<uintptr_t>(memory_);
  for (const auto& piece : pieces_) address.keys.push_back(fi_mr_key(piece.get()));
  return address;
}

void LibfabricRail::connect(uint32_t peer, const RailAddress& address, uint64_t memory_bytes) {
  const bool ip = info_->addr_format >= FI_SOCKADDR && info_->addr_format <= FI_SOCKADDR_IN6;
  if (ip && address_family(address.endpoint_name) != address_family(this->address().endpoint_name)) {
    throw ProtocolError(peer_name(peer) + " has an endpoint name of another address family on " + name() +
                        ". Choose interfaces of one family (EFA_EP_INTERFACE).");
  }
  std::array<std::byte, kMaxEndpointName>
      endpoint_name{};  // providers read a fixed length, whatever was sent
  std::ranges::copy(address.endpoint_name, endpoint_name.begin());
  if (peers_.size() <= peer) peers_.resize(peer + 1);
  Peer& entry = peers_[peer];
  const int inserted =
      fi_av_insert(address_vector_.get(), endpoint_name.data(), 1, &entry.address, 0, nullptr);
  if (inserted != 1) {
    throw ProtocolError("the provider refuses the endpoint name of " + peer_name(peer) + " on " + name() +
                        ": " + libfabric_error(inserted < 0 ? inserted : -FI_EADDRNOTAVAIL));
  }
  entry.base = address.base;
  entry.memory_bytes = memory_bytes;
  entry.keys = address.keys;
}

LibfabricRail::Peer& LibfabricRail::target_of(const WriteRequest& request) {
  if (request.peer >= peers_.size() || peers_[request.peer].keys.empty()) {
    throw ConfigurationError(peer_name(request.peer) +
                             " is not connected; connect() it before writing to it");
  }
  Peer& target = peers_[request.peer];
  if (request.bytes > max_write_bytes_) {
    throw ConfigurationError("a write of " + std::to_string(request.bytes) + " bytes is longer than " +
                             name() + " allows (" + std::to_string(max_write_bytes_) +
                             "); use smaller chunks");
  }
  const auto check = [&](const char* side, uint64_t offset, uint64_t size) {
    if (!outside(offset, request.bytes, size)) return;
    throw ConfigurationError("a write of " + std::to_string(request.bytes) + " bytes at " + side +
                             " offset " + std::to_string(offset) + " to " + peer_name(request.peer) +
                             " leaves the registered memory of " + std::to_string(size) + " bytes");
  };
  check("local", request.local_offset, memory_bytes_);
  check("remote", request.remote_offset, target.memory_bytes);
  if (request.fence && !honours_fence()) {
    throw ConfigurationError("a fenced write to " + peer_name(request.peer) + " cannot be posted: provider " +
                             info_->fabric_attr->prov_name + " grants no FI_FENCE on " + name() +
                             "; use a signal policy without fences (EFA_EP_SIGNAL_POLICY=counted)");
  }
  return target;
}

PostResult LibfabricRail::post_write(const WriteRequest& request) {
  Peer& target = target_of(request);
  if (free_writes_.empty()) return PostResult::kAgain;
  if (has_streams_ && target.window.is_full(request.bytes)) return PostResult::kAgain;

  // A write without bytes must still name registered memory on both sides; any will do.
  const uint64_t local_offset = request.bytes > 0 ? request.local_offset : 0;
  const uint64_t remote_offset = request.bytes > 0 ? request.remote_offset : 0;
  const uint64_t remote_piece = piece_of(remote_offset);
  const bool by_virtual_address = (info_->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0;

  const iovec source{memory_ + local_offset, request.bytes};
  void* descriptor = fi_mr_desc(pieces_[piece_of(local_offset)].get());
  fi_rma_iov destination{};
  destination.addr =
      by_virtual_address ? target.base + remote_offset : remote_offset - remote_piece * kPieceStride;
  destination.len = request.bytes;
  destination.key = target.keys[remote_piece];

  Write& write = *free_writes_.back();
  write.context = request.context;
  write.peer = request.peer;
  write.covered_bytes = has_streams_ ? target.window.covered_by(request.bytes) : 0;

  fi_msg_rma message{};
  message.msg_iov = &source;
  message.desc = &descriptor;
  message.iov_count = 1;
  message.addr = target.address;
  message.rma_iov = &destination;
  message.rma_iov_count = 1;
  message.context = &write.provider_context;
  message.data = request.immediate;
  uint64_t flags = FI_COMPLETION;
  if (request.notify) flags |= FI_REMOTE_CQ_DATA;
  if (request.delivered || write.covered_bytes > 0) flags |= FI_DELIVERY_COMPLETE;
  if (request.fence) flags |= FI_FENCE;
  const ssize_t result = fi_writemsg(endpoint_.get(), &message, flags);
  if (result == -FI_EAGAIN) return PostResult::kAgain;
  if (result != 0) {
    throw TransportError(
        "fi_writemsg to " + peer_name(request.peer) + " on " + name() + " failed: " + libfabric_error(result),
        request.peer);
  }
  write.in_flight = true;
  target.window.posted(request.bytes, write.covered_bytes);
  free_writes_.pop_back();
  return PostResult::kPosted;
}

size_t LibfabricRail::poll(std::span<Completion> completions) {
  if (!free_receives_.empty()) post_receives();
  std::array<fi_cq_data_entry, kPollBatch> entries;
  const size_t room = std::min(entries.size(), completions.size());
  if (room == 0) return 0;
  const ssize_t result = fi_cq_read(completion_queue_.get(), entries.data(), room);
  if (result == -FI_EAGAIN) return 0;
  if (result == -FI_EAVAIL) return read_error(completions.front());
  if (result < 0) throw TransportError("fi_cq_read on " + name() + " failed: " + libfabric_error(result), -1);
  for (ssize_t i = 0; i < result; ++i) completions[i] = completion_of(entries[i]);
  return static_cast<size_t>(result);
}

Completion LibfabricRail::completion_of(const fi_cq_data_entry& entry) {
  Completion completion;
  if (entry.flags & FI_REMOTE_CQ_DATA) {
    if (is_receive(entry.op_context)) free_receives_.push_back(static_cast<fi_context2*>(entry.op_context));
    completion.kind = CompletionKind::kArrival;
    completion.immediate = static_cast<uint32_t>(entry.data);
    return completion;
  }
  Write* write = write_of(entry.op_context);
  if (write == nullptr) {
    throw TransportError("completion of an operation that was never posted on " + name() + " (flags " +
                             std::to_string(entry.flags) + ")",
                         -1);
  }
  completion.kind = CompletionKind::kWriteDone;
  completion.context = write->context;
  release(*write);
  return completion;
}

size_t LibfabricRail::read_error(Completion& completion) {
  libfabric_compat::CqErrEntry padded;
  fi_cq_err_entry& error = padded.entry;
  const ssize_t result = fi_cq_readerr(completion_queue_.get(), &error, 0);
  if (result == -FI_EAGAIN) return 0;
  if (result < 0)
    throw TransportError("fi_cq_readerr on " + name() + " failed: " + libfabric_error(result), -1);

  std::array<char, 256> buffer{};
  const char* details =
      fi_cq_strerror(completion_queue_.get(), error.prov_errno, error.err_data, buffer.data(), buffer.size());
  std::string text = std::string(fi_strerror(error.err)) + " (error " + std::to_string(error.err) +
                     ", provider error " + std::to_string(error.prov_errno) + (details ? ": " : "") +
                     (details ? details : "") + ") on " + name();
  std::ranges::replace(text, '\n', ' ');

  Write* write = write_of(error.op_context);
  if (write == nullptr) throw TransportError("a peer's write to this rank failed: " + text, -1);
  completion = Completion{};
  completion.kind = CompletionKind::kError;
  completion.context = write->context;
  completion.error = std::move(text);
  release(*write);
  return 1;
}

bool LibfabricRail::is_receive(const void* context) const {
  const auto address = reinterpret_cast<uintptr_t>(context);
  const auto first = reinterpret_cast<uintptr_t>(receives_.data());
  return address >= first && address < first + receives_.size() * sizeof(fi_context2);
}

LibfabricRail::Write* LibfabricRail::write_of(void* context) {
  const auto distance = reinterpret_cast<uintptr_t>(context) - reinterpret_cast<uintptr_t>(writes_.data());
  const size_t index = distance / sizeof(Write);
  if (distance % sizeof(Write) != 0 || index >= writes_.size() || !writes_[index].in_flight) return nullptr;
  return &writes_[index];
}

void LibfabricRail::release(Write& write) {
  write.in_flight = false;
  peers_[write.peer].window.completed(write.covered_bytes);
  free_writes_.push_back(&write);
}

std::string LibfabricRail::name() const {
  return std::string(nic()) + " (rail " + std::to_string(index_) + ")";
}

std::string LibfabricRail::peer_name(uint32_t peer) const { return "rank " + std::to_string(peer); }

}  // namespace efa_ep
