// The four halves as kernel launches. A launch reads host memory for its arguments only: no half calls the
// host, waits for it, or allocates, so all of them can be captured into a CUDA graph and replayed.
//
// The halves of a channel go in order, in one stream or in streams ordered by events; channels are
// independent. A send half waits for no rank. A receive half waits on the device, with a deadline. A fault is
// reported through DeviceMemory::error (device_error.h); kernels after it leave at once and write no row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device_state.h"
#include "protocol/quantisation.h"

struct CUstream_st;

namespace efa_ep::cuda {

/// cudaStream_t, without CUDA's headers.
using Stream = CUstream_st*;

/// What a launch needs to know on the host. Fixed for an instance, but for channel and stream.
struct HalfLaunch {
  const DeviceState* state = nullptr;  ///< in device memory: the start of the workspace
  uint32_t channel = 0;
  uint32_t nodes = 1;
  uint32_t ranks_per_node = 1;
  ScalarType combine_type = ScalarType::kBfloat16;
  bool per_expert = false;  ///< as DeviceConfig::per_expert
  uint32_t num_sms = 16;    ///< most blocks of a kernel: at most one per SM does the work
  Stream stream = nullptr;
};

/// Tokens to send, in device memory. All tables are contiguous, row by row, and 16-byte aligned.
struct DispatchInput {
  /// [tokens] rows `x_stride` bytes apart, a multiple of 16: of payload_bytes, or with quantisation of
  /// payload_bytes bf16 values. Rows in activations() are read there by the own node, without a copy; they
  /// cannot be quantised.
  const std::byte* x = nullptr;
  size_t x_stride = 0;
  const std::byte* scales =
      nullptr;                ///< [tokens] rows of scale_bytes; unused if that is 0, or with quantisation
  const void* ids = nullptr;  ///< [tokens, top_k] int32 or int64; -1 drops the slot
  bool ids_are_64_bit = false;
  const float* weights = nullptr;  ///< [tokens, top_k]
  uint32_t tokens = 0;             ///< at most max_tokens
  /// If not null, the number of tokens, at most `tokens`, is read from there when the kernel runs.
  const int32_t* tokens_on_device = nullptr;
  Quantisation quantisation = Quantisation::kNone;
};

/// Where received rows go, in (source rank, token) order: M rows, or in the per_expert layout
/// [local experts, capacity] with capacity = world * max_tokens.
struct DispatchOutput {
  std::byte* x = nullptr;                ///< rows of payload_bytes
  std::byte* scales = nullptr;           ///< rows of scale_bytes
  int32_t* ids = nullptr;                ///< [M, top_k] global ids; not written in the per_expert layout
  float* weights = nullptr;              ///< [M, top_k]; not written in the per_expert layout
  int32_t* tokens_per_expert = nullptr;  ///< [local experts]
  int32_t* rows = nullptr;               ///< [1] M; may be null
};

/// Expert results, in the order of the DispatchOutput.
struct CombineInput {
  /// per_token: [M] rows, one per received row, or with `per_slot` [M, top_k] rows of which only the slots of
  /// own experts are read. per_expert: [local experts, capacity] rows. [M] rows that lie in results() already
  /// are sent from there, without a copy.
  const std::byte* rows = nullptr;
  bool per_slot = false;
  bool weights_applied = true;  ///< false: multiply each slot's row with its router weight here
};

/// Starts a round.
void launch_dispatch_send(const HalfLaunch& launch, const DispatchInput& input);
/// Waits for the rows of this rank's experts, offers what its rail received to the ranks of the node, packs.
void launch_dispatch_recv(const HalfLaunch& launch, const DispatchOutput& output);
/// Reads the input completely before it ends, unless it lies in results().
void launch_combine_send(const HalfLaunch& launch, const CombineInput& input);
/// Sends the node's sums to the sources of the rail, waits for those of the own tokens, and writes
/// out[tokens] rows of combine_bytes; a token without experts gets zeros.
void launch_combine_recv(const HalfLaunch& launch, std::byte* out);

/// Where the caller may produce the activations of the next round, DeviceState::dispatch_row bytes apart: as
/// an offset in the own arena. From the end of combine_recv to the start of dispatch_send.
inline size_t activations(const Layout& layout, uint32_t channel) { return layout.activations(channel); }
/// Where combine_send puts, or finds, the [M] rows to send: as an offset in the own arena. From the end of
/// dispatch_recv to the start of combine_send.
inline size_t results(const Layout& layout, uint32_t channel) { return layout.results(channel); }

}  // namespace efa_ep::cuda
