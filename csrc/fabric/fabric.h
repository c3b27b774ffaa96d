// The network as the proxy sees it. The contract is EFA's, the weakest of all that this project meets, so
// that whatever runs on it runs on every better network:
//
//  - writes complete and arrive in any order, also between the same two endpoints; the bytes of one write
//    become visible in any order; only the write's immediate, reported by poll(), says that they are there;
//  - one local and one remote range per write, a 32-bit immediate, no atomics; a fence only where the
//    description says so;
//  - the queue is bounded: post_write() answers kAgain, and only poll() makes room;
//  - a target accepts writes only from peers it has connect()ed;
//  - a completion may report an error, and the death of a peer may not be reported at all.
//
// A Fabric is used by one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "errors.h"

namespace efa_ep {

/// What of its sender's is posted in full with this write: how signal policies know what shares a wait.
enum class Ends : uint8_t {
  kNothing,   ///< more writes of the same transfer to this peer follow
  kTransfer,  ///< more transfers of the same group to this peer follow
  kGroup,
};

/// One RDMA write, with immediate data unless it is silent, from and to registered arenas.
struct WriteRequest {
  uint32_t peer = 0;           ///< rank of the target, connected before
  uint32_t rail = 0;           ///< local NIC, and the target's NIC with the same number; < Fabric::rails()
  uint64_t local_offset = 0;   ///< bytes from the start of this rank's registered memory
  uint64_t remote_offset = 0;  ///< bytes from the start of the target's registered memory
  uint32_t bytes = 0;          ///< may be 0: the immediate alone
  uint32_t immediate = 0;
  uint64_t context = 0;  ///< comes back in the completion of this write

  bool notify = true;      ///< false: bytes alone; the target gets no immediate and learns nothing
  bool delivered = false;  ///< the completion also means that the bytes are visible at the target
  /// This write and all later ones to `peer` on `rail` start when all earlier ones are visible there. Only
  /// where FabricDescription::honours_fence; ConfigurationError elsewhere.
  bool fence = false;
  Ends ends = Ends::kGroup;  ///< ignored by fabrics
};

enum class PostResult : uint8_t {
  kPosted,
  kAgain,  ///< no room, or the connection is not up yet: poll() and try again
};

enum class CompletionKind : uint8_t {
  kWriteDone,  ///< a write of this rank is complete: its source bytes may be reused
  kArrival,    ///< a peer's write is complete here: all its bytes are visible
  kError,      ///< a write of this rank failed; `error` says why
};

struct Completion {
  CompletionKind kind = CompletionKind::kWriteDone;
  uint64_t context = 0;    ///< kWriteDone, kError: the context of the write
  uint32_t immediate = 0;  ///< kArrival
  std::string error;       ///< kError: one line with the provider's error number and text
};

/// What the chosen provider can do; fixed after construction.
struct FabricDescription {
  std::string library;   ///< path and version of the libfabric in use, empty if none
  std::string provider;  ///< e.g. "efa", "tcp"
  std::string fabric;    ///< e.g. "efa-direct"
  std::vector<std::string> nics;
  uint32_t send_queue_depth = 0;        ///< most writes in flight per rail
  uint32_t completion_queue_depth = 0;  ///< most unpolled completions per rail, arrivals included
  uint64_t max_write_bytes = 0;
  bool honours_fence = false;  ///< WriteRequest::fence works
};

/// Memory of a GPU, which the CPU need not be able to read.
struct DeviceRange {
  std::byte* base = nullptr;  ///< the device's address
  size_t bytes = 0;
  int dmabuf = -1;     ///< a dma-buf of exactly this range, only used during the call; -1: none
  int64_t device = 0;  ///< CUDA's number of the GPU
};

class Fabric {
 public:
  Fabric() = default;
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;
  virtual ~Fabric() = default;

  virtual const FabricDescription& description() const = 0;
  uint32_t rails() const { return static_cast<uint32_t>(description().nics.size()); }

  /// Registers this rank's memory on every rail. Once, before address().
  virtual void register_memory(std::byte* base, size_t bytes) = 0;

  /// The same for memory of a GPU. Throws ConfigurationError on fabrics that know none, and
  /// FabricUnavailableError naming what the machine lacks.
  virtual void register_device_memory(const DeviceRange&) {
    throw ConfigurationError("this fabric cannot register GPU memory");
  }

  /// What a peer needs to write here (endpoint names, remote keys, base addresses), as opaque bytes.
  virtual std::vector<std::byte> address() const = 0;

  /// Makes `peer` a legal target and a legal initiator. Every rank connects all its peers before any rank
  /// writes. Throws ProtocolError if the bytes are not an address() of a compatible fabric.
  virtual void connect(uint32_t peer, std::span<const std::byte> address) = 0;

  virtual PostResult post_write(const WriteRequest& request) = 0;

  /// Fills `completions` from the front and returns how many; 0 if nothing happened. Makes progress.
  virtual size_t poll(std::span<Completion> completions) = 0;
};

}  // namespace efa_ep
