// The halves on a GPU. Tensors and memory arrive as addresses, streams as cudaStream_t in an integer.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstddef>

#include "bindings/common.h"
#include "bindings/times.h"

#include "cuda/device.h"
#include "cuda/stand_in.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace efa_ep::bindings {

namespace {

using cuda::CudaDevice;
using cuda::DeviceRingReader;
using cuda::HostBlock;

void bind_host_block(nb::module_& m) {
  m.def(
      "cuda_host_bytes",
      [](uint32_t ring_commands, const Layout& layout) { return HostBlock::bytes(ring_commands, layout); },
      "ring_commands"_a, "layout"_a, "Bytes of pinned memory that a device and its proxy share.");
  m.def(
      "cuda_signals_offset", [](uint32_t ring_commands) { return HostBlock::signals_offset(ring_commands); },
      "ring_commands"_a, "Where in it the signals are, if they are not in the arena.");
  m.attr("cuda_error_offset") = offsetof(HostBlock, error);
  m.def(
      "cuda_stop",
      [](uintptr_t host_address) {
        std::atomic_ref(pointer<HostBlock>(host_address)->stop).store(1, std::memory_order_release);
      },
      "host_address"_a, "Ends all waits of the kernels that share this memory, for good.");
  nb::class_<DeviceRingReader, CommandSource>(m, "DeviceRing")
      .def(
          "__init__",
          [](DeviceRingReader* self, uintptr_t host_address, uint32_t ring_commands) {
            auto* base = pointer<std::byte>(host_address);
            auto* entries = reinterpret_cast<cuda::RingEntry*>(base + HostBlock::ring_offset());
            auto* host = reinterpret_cast<HostBlock*>(base);
            new (self) DeviceRingReader(entries, &host->ring_tail, &host->stop, ring_commands);
          },
          nb::kw_only(), "host_address"_a, "ring_commands"_a);
}

nb::typed<nb::dict, std::string, nb::any> counters_of(const CudaDevice& device) {
  const cuda::ChannelTotals totals = device.totals();
  nb::dict result;
  result["rounds"] = totals.rounds;
  result["tokens"] = totals.tokens;
  result["received_rows"] = totals.received_rows;
  result["network_rows"] = totals.network_rows;
  result["peer_rows"] = totals.peer_rows;
  result["dropped_slots"] = totals.dropped_slots;
  result["dropped_weight"] =
      static_cast<double>(static_cast<int64_t>(totals.dropped_weight)) / cuda::ChannelTotals::kWeightUnits;
  return result;
}

void bind_stand_in(nb::module_& m) {
  using cuda::StandIn;
  nb::class_<StandIn>(m, "CudaStandIn")
      .def(
          "__init__",
          [](StandIn* self, CudaDevice& device, uintptr_t server_host_address, int gpu) {
            new (self) StandIn(device, *pointer<const HostBlock>(server_host_address), gpu);
          },
          nb::kw_only(), "device"_a, "server_host_address"_a, "gpu"_a, nb::keep_alive<1, 2>(),
          "The pinned memory of the rank that serves it outlives it.")
      .def(
          "wait_until_idle",
          [](StandIn& self, double most_s) { return self.wait_until_idle(seconds(most_s)); }, "most_s"_a,
          ReleaseLock())
      .def("stop", &StandIn::stop, ReleaseLock())
      .def("throw_if_failed", &StandIn::throw_if_failed);
}

}  // namespace

void bind_cuda(nb::module_& m) {
  // Empty in builds without kernels, whose launches throw.
  m.attr("cuda_architectures") = EFA_EP_CUDA_ARCHITECTURES;
  bind_host_block(m);
  nb::class_<CudaDevice> device(m, "CudaDevice");
  device
      .def(
          "__init__",
          [](CudaDevice* self, const Layout& layout, uint32_t rank, std::vector<uint32_t> expert_owner,
             ScalarType combine_type, bool per_expert, double timeout_s, uint32_t num_sms,
             Quantisation quantisation, uint64_t chunk_bytes, const std::vector<uintptr_t>& arenas,
             uintptr_t host_address, uintptr_t host_address_on_device, uint32_t ring_commands,
             bool signals_in_arena, Proxy* proxy, const CheckWait& check_wait) {
            cuda::CudaDeviceOptions options;
            options.config = {.layout = layout,
                              .rank = rank,
                              .expert_owner = std::move(expert_owner),
                              .per_expert = per_expert,
                              .chunk_bytes = proxy == nullptr ? chunk_bytes : proxy->chunk_bytes(),
                              .rails = proxy == nullptr ? 1 : proxy->rails(),
                              .timeout_ns = static_cast<uint64_t>(seconds(timeout_s).count())};
            options.combine_type = combine_type;
            options.num_sms = num_sms;
            options.quantisation = quantisation;
            options.host = pointer<std::byte>(host_address);
            options.host_on_device = pointer<std::byte>(host_address_on_device);
            options.ring_capacity = ring_commands;
            for (const uintptr_t arena : arenas) options.arenas.push_back(pointer<std::byte>(arena));
            options.signals_in_arena = signals_in_arena;
            options.check_interrupt = interrupt_check(check_wait);
            new (self) CudaDevice(options, proxy);
          },
          nb::kw_only(), "layout"_a, "rank"_a, "expert_owner"_a, "combine_type"_a, "per_expert"_a,
          "timeout_s"_a, "num_sms"_a, "quantisation"_a, "chunk_bytes"_a, "arenas"_a, "host_address"_a,
          "host_address_on_device"_a, "ring_commands"_a, "signals_in_arena"_a, "proxy"_a.none(),
          "check_wait"_a, nb::keep_alive<1, 16>())
      .def_prop_ro("workspace_bytes", &CudaDevice::workspace_bytes)
      .def(
          "use_workspace",
          [](CudaDevice& device, uintptr_t address) {
            const std::vector<std::byte> image = device.use_workspace(pointer<std::byte>(address));
            return nb::bytes(reinterpret_cast<const char*>(image.data()), image.size());
          },
          "address"_a, "Returns what the caller copies to the workspace's start before the first half.")
      .def(
          "dispatch_send",
          [](CudaDevice& device, uint32_t channel, uintptr_t stream, uintptr_t x, size_t x_stride,
             uintptr_t scales, uintptr_t ids, bool ids_are_64_bit, uintptr_t weights, uint32_t tokens,
             uintptr_t token_count) {
            cuda::DispatchInput input;
            input.x = pointer<const std::byte>(x);
            input.x_stride = x_stride;
            input.scales = pointer<const std::byte>(scales);
            input.ids = pointer<const void>(ids);
            input.ids_are_64_bit = ids_are_64_bit;
            input.weights = pointer<const float>(weights);
            input.tokens = tokens;
            input.tokens_on_device = pointer<const int32_t>(token_count);
            device.dispatch_send(channel, pointer<CUstream_st>(stream), input);
          },
          "channel"_a, "stream"_a, "x"_a, "x_stride"_a, "scales"_a, "ids"_a, "ids_are_64_bit"_a, "weights"_a,
          "tokens"_a, "token_count"_a, ReleaseLock())
      .def(
          "dispatch_recv",
          [](CudaDevice& device, uint32_t channel, uintptr_t stream, uintptr_t x, uintptr_t scales,
             uintptr_t ids, uintptr_t weights, uintptr_t tokens_per_expert) {
            cuda::DispatchOutput output;
            output.x = pointer<std::byte>(x);
            output.scales = pointer<std::byte>(scales);
            output.ids = pointer<int32_t>(ids);
            output.weights = pointer<float>(weights);
            output.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
            device.dispatch_recv(channel, pointer<CUstream_st>(stream), output);
          },
          "channel"_a, "stream"_a, "x"_a, "scales"_a, "ids"_a, "weights"_a, "tokens_per_expert"_a,
          ReleaseLock())
      .def(
          "wait_for_rows",
          [](CudaDevice& device, uint32_t channel, uintptr_t stream) {
            return device.wait_for_rows(channel, pointer<CUstream_st>(stream));
          },
          "channel"_a, "stream"_a, ReleaseLock())
      .def(
          "wait", [](CudaDevice& device, uintptr_t stream) { device.wait(pointer<CUstream_st>(stream)); },
          "stream"_a, ReleaseLock())
      .def(
          "combine_send",
          [](CudaDevice& device, uint32_t channel, uintptr_t stream, uintptr_t rows, bool per_slot,
             bool weights_applied) {
            device.combine_send(channel, pointer<CUstream_st>(stream),
                                {.rows = pointer<const std::byte>(rows),
                                 .per_slot = per_slot,
                                 .weights_applied = weights_applied});
          },
          "channel"_a, "stream"_a, "rows"_a, "per_slot"_a, "weights_applied"_a, ReleaseLock())
      .def(
          "combine_recv",
          [](CudaDevice& device, uint32_t channel, uintptr_t stream, uintptr_t out) {
            device.combine_recv(channel, pointer<CUstream_st>(stream), pointer<std::byte>(out));
          },
          "channel"_a, "stream"_a, "out"_a, ReleaseLock())
      .def("counters", [](const CudaDevice& device) { return counters_of(device); })
      .def("throw_if_failed", &CudaDevice::throw_if_failed);
  bind_times(device);
  bind_stand_in(m);
}

}  // namespace efa_ep::bindings
