// The four halves on a GPU, as the bindings see them: launches in the caller's stream, and faults of kernels
// as exceptions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/device_error.h"
#include "cuda/device_state.h"
#include "cuda/halves.h"
#include "cuda/host_block.h"
#include "proxy/proxy.h"
#include "proxy/wait.h"

namespace efa_ep::cuda {

struct CudaDeviceOptions {
  DeviceConfig config;
  ScalarType combine_type = ScalarType::kBfloat16;
  uint32_t num_sms = 16;
  Quantisation quantisation = Quantisation::kNone;

  /// HostBlock and what follows it, zeros, in pinned memory; by the host's and by the device's address.
  std::byte* host = nullptr;
  std::byte* host_on_device = nullptr;
  uint32_t ring_capacity = 0;  ///< a power of two
  /// Device addresses of the arenas of the node's ranks, in order.
  std::vector<std::byte*> arenas;
  bool signals_in_arena = false;  ///< else they follow the ring
  InterruptCheck check_interrupt = nullptr;
};

class CudaDevice {
 public:
  /// `proxy` may be null if the world has one node; it outlives the device. The memory does, too.
  CudaDevice(const CudaDeviceOptions& options, Proxy* proxy);

  /// Bytes of the workspace in device memory.
  size_t workspace_bytes() const { return efa_ep::cuda::workspace_bytes(options_.config); }
  /// Takes a workspace of zeros, 256-byte aligned. Returns what the caller copies to its start before the
  /// first half.
  std::vector<std::byte> use_workspace(std::byte* workspace);

  // Each launches a half and returns. All throw what an earlier half, or the proxy, has failed with.
  void dispatch_send(uint32_t channel, Stream stream, const DispatchInput& input);
  /// `output.rows` is ignored: the device has its own word for it.
  void dispatch_recv(uint32_t channel, Stream stream, const DispatchOutput& output);
  void combine_send(uint32_t channel, Stream stream, const CombineInput& input);
  void combine_recv(uint32_t channel, Stream stream, std::byte* out);

  /// Waits until the stream's work is done, and with it the channel's dispatch_recv(). Returns the number of
  /// rows it received. Not while the stream is captured.
  uint32_t wait_for_rows(uint32_t channel, Stream stream);
  /// Waits until the stream's work is done.
  void wait(Stream stream);

  /// Rethrows the first failure of the proxy, or of a kernel so far.
  void throw_if_failed() const;

  /// What its kernels have counted, all channels together.
  ChannelTotals totals() const;
  /// How long their halves took and waited, all channels together. A round counts when the next one begins.
  HalfTimes times() const;

  uint32_t channels() const { return options_.config.layout.channels; }
  uint32_t capacity() const {
    return options_.config.layout.topology.world * options_.config.layout.max_tokens;
  }

 private:
  enum class Stage : uint8_t { kIdle, kDispatchSent, kDispatchReceived, kCombineSent };

  HalfLaunch launch(uint32_t channel, Stream stream, Stage expected, Stage next, const char* call);
  HostBlock& host() const { return *reinterpret_cast<HostBlock*>(options_.host); }

  const CudaDeviceOptions options_;
  Proxy* const proxy_;
  const DeviceState* state_ = nullptr;
  std::vector<Stage> stages_;
};

/// Throws what a fault means to the caller. `proxy`, null if the world has one node, knows which ranks have
/// not confirmed writes, and may be what was waited for.
[[noreturn]] void throw_fault(const DeviceError& error, const DeviceConfig& config, Proxy* proxy);

}  // namespace efa_ep::cuda
