// Floor of the network: the bytes of a round as bare fabric writes, and nothing else. No routing, no packing,
// no thread but the caller's, no summing. A C interface, so that the ranks of benchmarks/round_trip.py load
// it and take turns with the other contestants in the same processes.

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "errors.h"
#include "fabric/libfabric_fabric.h"

namespace efa_ep {
namespace {

constexpr auto kTimeout = std::chrono::seconds(120);

struct Unmap {
  size_t bytes;
  void operator()(std::byte* memory) const { munmap(memory, bytes); }
};
using Mapping = std::unique_ptr<std::byte, Unmap>;

Mapping map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return Mapping(static_cast<std::byte*>(memory), Unmap{bytes});
}

/// One rank. Its memory is one source range, sent to every peer, and one target range per source rank.
class BareWrites {
 public:
  BareWrites(const LibfabricOptions& options, uint32_t rank, uint32_t world, uint64_t pair_bytes,
             uint64_t chunk_bytes)
      : rank_(rank),
        world_(world),
        pair_bytes_(pair_bytes),
        chunk_bytes_(chunk_bytes),
        memory_(map_memory((size_t{world} + 1) * pair_bytes)),
        fabric_(options) {
    fabric_.register_memory(memory_.get(), (size_t{world} + 1) * pair_bytes);
  }

  Fabric& fabric() { return fabric_; }

  /// Sends `sent[p]` bytes to every peer p, and returns when they are gone and `received[p]` bytes of every
  /// peer have arrived. (The tcp provider sends only while it is polled, so nothing may be left behind.)
  void exchange(std::span<const uint64_t> sent, std::span<const uint64_t> received) {
    ++exchanges_;
    uint64_t expected = 0;
    uint64_t most_chunks = 0;
    for (uint32_t peer = 0; peer < world_; ++peer) {
      if (peer == rank_) continue;
      expected += chunks_of(received[peer]);
      most_chunks = std::max(most_chunks, chunks_of(sent[peer]));
    }
    const auto deadline = std::chrono::steady_clock::now() + kTimeout;
    // Chunk by chunk over all peers, starting behind the own rank: no peer is last for everyone.
    for (uint64_t chunk = 0; chunk < most_chunks; ++chunk) {
      for (uint32_t step = 1; step < world_; ++step) {
        const uint32_t peer = (rank_ + step) % world_;
        if (chunk < chunks_of(sent[peer])) post(peer, chunk, sent[peer], deadline);
      }
    }
    // A peer may be one exchange ahead, but not two: its next but one needs the write this rank sends next.
    uint64_t& arrived = arrived_[exchanges_ % 2];
    while (arrived < expected || outstanding_ > 0) progress(deadline);
    arrived = 0;
  }

 private:
  using Deadline = std::chrono::steady_clock::time_point;

  /// A pair without bytes still signals, as in the protocol.
  uint64_t chunks_of(uint64_t bytes) const {
    return std::max<uint64_t>(1, (bytes + chunk_bytes_ - 1) / chunk_bytes_);
  }

  void post(uint32_t peer, uint64_t chunk, uint64_t bytes, Deadline deadline) {
    const uint64_t first = chunk * chunk_bytes_;
    WriteRequest request;
    request.peer = peer;
    request.local_offset = first;
    request.remote_offset = (rank_ + 1) * pair_bytes_ + first;
    request.bytes = static_cast<uint32_t>(std::min(chunk_bytes_, bytes - first));
    request.immediate = exchanges_ % 2;
    while (fabric_.post_write(request) == PostResult::kAgain) progress(deadline);
    ++outstanding_;
  }

  void progress(Deadline deadline) {
    const size_t count = fabric_.poll(completions_);
    for (const Completion& completion : std::span(completions_).first(count)) {
      if (completion.kind == CompletionKind::kError) throw TransportError(completion.error, -1);
      if (completion.kind == CompletionKind::kArrival) ++arrived_[completion.immediate];
      if (completion.kind == CompletionKind::kWriteDone) --outstanding_;
    }
    if (count > 0) return;
    sched_yield();
    if (std::chrono::steady_clock::now() > deadline) {
      throw RankTimeoutError("bare writes did not arrive in 120 s", "exchange", exchanges_, {});
    }
  }

  const uint32_t rank_;
  const uint32_t world_;
  const uint64_t pair_bytes_;
  const uint64_t chunk_bytes_;
  Mapping memory_;  // outlives fabric_, which has it registered
  LibfabricFabric fabric_;
  std::vector<Completion> completions_ = std::vector<Completion>(64);
  uint32_t exchanges_ = 0;
  uint64_t outstanding_ = 0;
  std::array<uint64_t, 2> arrived_{};
};

thread_local std::string last_error;

/// Runs `call` and returns its result, or `failure` with the text for bare_writes_error().
template <class Result, class Call>
Result guarded(Result failure, Call call) {
  try {
    return call();
  } catch (const std::exception& error) {
    last_error = error.what();
    return failure;
  }
}

}  // namespace
}  // namespace efa_ep

using efa_ep::BareWrites;
using efa_ep::guarded;

#define EFA_EP_EXPORT extern "C" __attribute__((visibility("default")))

/// Why the last call in this thread failed.
EFA_EP_EXPORT const char* bare_writes_error() { return efa_ep::last_error.c_str(); }

/// Opens an endpoint for at most `pair_bytes` to and from each rank; null on error.
EFA_EP_EXPORT void* bare_writes_open(const char* library, const char* provider, const char* interface,
                                     uint32_t rank, uint32_t world, uint64_t pair_bytes,
                                     uint64_t chunk_bytes) {
  return guarded<void*>(nullptr, [&] {
    efa_ep::LibfabricOptions options;
    options.library = library;
    options.provider = provider;
    options.interface = interface;
    options.peers = world - 1;
    return new BareWrites(options, rank, world, pair_bytes, chunk_bytes);
  });
}

/// Copies the address for the peers to `address`, if it fits, and returns its bytes; 0 on error.
EFA_EP_EXPORT uint64_t bare_writes_address(void* handle, void* address, uint64_t capacity) {
  return guarded<uint64_t>(0, [&] {
    const std::vector<std::byte> own = static_cast<BareWrites*>(handle)->fabric().address();
    if (own.size() <= capacity) std::memcpy(address, own.data(), own.size());
    return own.size();
  });
}

/// Returns 0, or -1 on error, as the next one.
EFA_EP_EXPORT int bare_writes_connect(void* handle, uint32_t peer, const void* address, uint64_t bytes) {
  return guarded(-1, [&] {
    static_cast<BareWrites*>(handle)->fabric().connect(peer, {static_cast<const std::byte*>(address), bytes});
    return 0;
  });
}

/// Sends and receives the given bytes, one entry per rank.
EFA_EP_EXPORT int bare_writes_exchange(void* handle, const uint64_t* sent, const uint64_t* received,
                                       uint32_t world) {
  return guarded(-1, [&] {
    static_cast<BareWrites*>(handle)->exchange({sent, world}, {received, world});
    return 0;
  });
}

EFA_EP_EXPORT void bare_writes_close(void* handle) { delete static_cast<BareWrites*>(handle); }
