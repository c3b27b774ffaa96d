// The Python module vllm_efa_ep._core: thin, and free of torch. Halves take tensors as addresses, whose
// shapes and dtypes have been checked before: by tensors.cpp, or at length by the package. Calls that wait or
// copy release the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>

#include "bindings/common.h"
#include "bindings/times.h"
#include "cpu/device.h"
#include "cpu/stand_in.h"
#include "errors.h"
#include "fabric/libfabric_fabric.h"
#include "memory/arena.h"
#include "protocol/layout.h"
#include "proxy/proxy.h"
#include "proxy/signal_policy.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace efa_ep;
using namespace efa_ep::bindings;

namespace {

using Counters = nb::typed<nb::dict, std::string, uint64_t>;

nb::typed<nb::dict, std::string, nb::any> describe(const FabricDescription& description) {
  nb::dict result;
  result["library"] = description.library;
  result["provider"] = description.provider;
  result["fabric"] = description.fabric;
  result["nics"] = description.nics;
  return result;
}

Counters counters_of(const Proxy& proxy) {
  const ProxyCounters counters = proxy.counters();
  nb::dict result;
  result["writes"] = counters.writes;
  result["bytes_written"] = counters.bytes;
  result["completions"] = counters.completions;
  result["immediates"] = counters.immediates;
  result["retries"] = counters.retries;
  return result;
}

Counters counters_of(const SignalPolicy& policy) {
  const SignalCounters counters = policy.counters();
  nb::dict result;
  result["fences"] = counters.fences;
  result["fence_waits"] = counters.waits;
  result["signal_requests"] = counters.signals;
  result["stall_ns"] = counters.stall_ns;
  return result;
}

nb::typed<nb::dict, std::string, nb::any> counters_of(const CpuDevice& device) {
  const DeviceCounters counters = device.counters();
  nb::dict result;
  result["rounds"] = counters.rounds;
  result["tokens"] = counters.tokens;
  result["received_rows"] = counters.received_rows;
  result["network_rows"] = counters.network_rows;
  result["peer_rows"] = counters.peer_rows;
  result["dropped_slots"] = counters.dropped_slots;
  result["dropped_weight"] = counters.dropped_weight;
  return result;
}

void bind_protocol(nb::module_& m) {
  m.def("limits", []() -> Counters {
    nb::dict result;
    result["ranks"] = kMaxRanks;
    result["nodes"] = kMaxNodes;
    result["experts"] = kMaxExperts;
    result["top_k"] = kMaxTopK;
    result["tokens_per_rank"] = kMaxTokensPerRank;
    result["channels"] = kMaxChannels;
    return result;
  });
  nb::class_<Layout>(m, "Layout")
      .def(
          "__init__",
          [](Layout* self, uint32_t world, uint32_t ranks_per_node, uint32_t top_k, uint32_t payload_bytes,
             uint32_t scale_bytes, uint32_t combine_bytes, uint32_t max_tokens, uint32_t channels) {
            if (ranks_per_node == 0 || world % ranks_per_node != 0) {
              throw ConfigurationError(std::to_string(world) + " ranks do not divide into nodes of " +
                                       std::to_string(ranks_per_node));
            }
            new (self) Layout{.topology = {world, ranks_per_node},
                              .row = {top_k, payload_bytes, scale_bytes, combine_bytes},
                              .max_tokens = max_tokens,
                              .channels = channels};
          },
          nb::kw_only(), "world"_a, "ranks_per_node"_a, "top_k"_a, "payload_bytes"_a, "scale_bytes"_a,
          "combine_bytes"_a, "max_tokens"_a, "channels"_a)
      .def_prop_ro("total_bytes", &Layout::total_bytes)
      .def_prop_ro("signal_bytes", &Layout::signal_bytes)
      .def_prop_ro("top_k", [](const Layout& layout) { return layout.row.top_k; })
      .def_prop_ro("dispatch_row_bytes", &Layout::dispatch_row)
      .def_prop_ro("combine_row_bytes", &Layout::combine_row)
      .def_ro("channels", &Layout::channels)
      .def_prop_ro("result_rows", &Layout::result_rows)
      .def("results_offset", &Layout::results, "channel"_a)
      .def("activations_offset", &Layout::activations, "channel"_a)
      .def("sections", [](const Layout& layout) -> Counters {
        nb::dict result;
        for (uint32_t s = 0; s < kSections; ++s) {
          result[kSectionNames[s]] = layout.padded_bytes(static_cast<Section>(s));
        }
        return result;
      });
}

void bind_memory(nb::module_& m) {
  nb::class_<Arena>(m, "Arena")
      .def_static("create", &Arena::create, "bytes"_a)
      .def_static("map", &Arena::map, "descriptor"_a, "bytes"_a)
      .def_static("allocated_bytes", &Arena::allocated_bytes, "bytes"_a)
      .def_prop_ro("bytes", &Arena::bytes)
      .def_prop_ro("descriptor", &Arena::descriptor)
      .def(
          "view",
          [](const nb::object& self, size_t offset, size_t bytes) {
            const Arena& arena = nb::cast<const Arena&>(self);
            if (offset > arena.bytes() || bytes > arena.bytes() - offset) {
              throw ConfigurationError("bytes " + std::to_string(offset) + " to " +
                                       std::to_string(offset + bytes) + " are outside of an arena of " +
                                       std::to_string(arena.bytes()));
            }
            return nb::ndarray<uint8_t, nb::ndim<1>, nb::device::cpu>(arena.data() + offset, {bytes}, self);
          },
          "offset"_a, "bytes"_a, "Bytes of the region, as an array that keeps it mapped.")
      .def_prop_ro("huge_pages", &Arena::huge_pages);
}

void bind_fabric(nb::module_& m) {
  nb::class_<Fabric>(m, "Fabric")
      .def("description", [](const Fabric& fabric) { return describe(fabric.description()); })
      .def(
          "register_memory",
          [](Fabric& fabric, const Arena& arena) { fabric.register_memory(arena.data(), arena.bytes()); },
          "arena"_a, nb::keep_alive<1, 2>(), ReleaseLock())
      .def(
          "register_device_memory",
          [](Fabric& fabric, uintptr_t address, size_t bytes, int dmabuf, int device) {
            fabric.register_device_memory({pointer<std::byte>(address), bytes, dmabuf, device});
          },
          "address"_a, "bytes"_a, "dmabuf"_a, "device"_a, ReleaseLock(),
          "The memory outlives the fabric. `dmabuf` is used during the call only; -1: none.")
      .def("address",
           [](const Fabric& fabric) {
             const std::vector<std::byte> bytes = fabric.address();
             return nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
           })
      .def(
          "connect",
          [](Fabric& fabric, uint32_t peer, const nb::bytes& address) {
            fabric.connect(peer, {reinterpret_cast<const std::byte*>(address.c_str()), address.size()});
          },
          "peer"_a, "address"_a);
  nb::class_<LibfabricFabric, Fabric>(m, "LibfabricFabric")
      .def(
          "__init__",
          [](LibfabricFabric* self, std::string provider, std::string library, std::string interface,
             uint32_t nics, uint32_t rank_on_host, uint32_t ranks_on_host, bool fence, uint32_t peers,
             std::vector<std::string> rdma_devices, bool device_memory) {
            new (self) LibfabricFabric(LibfabricOptions{.provider = std::move(provider),
                                                        .library = std::move(library),
                                                        .interface = std::move(interface),
                                                        .nics = nics,
                                                        .local_rank = rank_on_host,
                                                        .ranks_on_host = ranks_on_host,
                                                        .rdma_devices = std::move(rdma_devices),
                                                        .fence = fence,
                                                        .device_memory = device_memory,
                                                        .peers = peers});
          },
          nb::kw_only(), "provider"_a, "library"_a, "interface"_a, "nics"_a, "rank_on_host"_a,
          "ranks_on_host"_a, "fence"_a, "peers"_a, "rdma_devices"_a = std::vector<std::string>{},
          "device_memory"_a = false, ReleaseLock());
}

void bind_signals(nb::module_& m) {
  nb::class_<SignalPolicy, Fabric>(m, "SignalPolicy")
      .def_static(
          "create",
          [](const std::string& name, Fabric& fabric) {
            return SignalPolicy::create(signal_policy_named(name), fabric);
          },
          "name"_a, "fabric"_a, nb::keep_alive<0, 2>())
      .def("counters", [](const SignalPolicy& policy) { return counters_of(policy); });
}

void bind_proxy(nb::module_& m) {
  // Only named here, so that others can derive from it.
  const nb::class_<CommandSource> command_source(m, "CommandSource");
  nb::class_<Proxy>(m, "Proxy")
      .def(
          "__init__",
          [](Proxy* self, Fabric& fabric, const Arena* arena, const Layout& layout, uint32_t rank,
             uint64_t chunk_bytes, uint32_t ring_commands, double timeout_s, bool own_core,
             CommandSource* commands, uintptr_t signals, bool signals_combine_writes,
             std::vector<uint32_t> cpus, size_t trace_spans) {
            if (arena == nullptr && signals == 0)
              throw ConfigurationError("a proxy needs an arena, or a place for its signals");
            new (self) Proxy(fabric, arena == nullptr ? nullptr : arena->data(),
                             {.layout = layout,
                              .rank = rank,
                              .chunk_bytes = chunk_bytes,
                              .ring_commands = ring_commands,
                              .timeout = seconds(timeout_s),
                              .own_core = own_core,
                              .commands = commands,
                              .signals = pointer<std::byte>(signals),
                              .signals_combine_writes = signals_combine_writes,
                              .cpus = std::move(cpus),
                              .trace_spans = trace_spans});
          },
          nb::kw_only(), "fabric"_a, "arena"_a.none(), "layout"_a, "rank"_a, "chunk_bytes"_a,
          "ring_commands"_a, "timeout_s"_a, "own_core"_a, "commands"_a.none() = nb::none(), "signals"_a = 0,
          "signals_combine_writes"_a = false, "cpus"_a = std::vector<uint32_t>{}, "trace_spans"_a = 0,
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 10>())
      .def("trace", [](Proxy& proxy) { return spans_of(proxy.trace()); })
      .def("dropped_spans", &Proxy::dropped_spans)
      .def("counters", [](const Proxy& proxy) { return counters_of(proxy); })
      .def(
          "drain",
          [](Proxy& proxy, double timeout_s, const CheckWait& check_wait) {
            const InterruptCheck check = interrupt_check(check_wait);
            const nb::gil_scoped_release unlock;
            proxy.drain(seconds(timeout_s), check);
          },
          "timeout_s"_a, "check_wait"_a);
}

DispatchOutput dispatch_output(uintptr_t x, uintptr_t scales, uintptr_t ids, uintptr_t weights,
                               uintptr_t tokens_per_expert) {
  return {.x = pointer<std::byte>(x),
          .scales = pointer<std::byte>(scales),
          .ids = pointer<int32_t>(ids),
          .weights = pointer<float>(weights),
          .tokens_per_expert = pointer<int32_t>(tokens_per_expert)};
}

CpuDeviceOptions device_options(const Layout& layout, uint32_t rank, std::vector<uint32_t> expert_owner,
                                ScalarType combine_type, bool per_expert, double timeout_s) {
  return {.layout = layout,
          .rank = rank,
          .expert_owner = std::move(expert_owner),
          .combine_type = combine_type,
          .per_expert = per_expert,
          .timeout = seconds(timeout_s)};
}

std::vector<std::byte*> bases_of(const std::vector<const Arena*>& arenas) {
  std::vector<std::byte*> bases;
  for (const Arena* arena : arenas) bases.push_back(arena->data());
  return bases;
}

void bind_stand_in(nb::module_& m) {
  nb::class_<StandIn>(m, "StandIn")
      .def(
          "__init__",
          [](StandIn* self, const Layout& layout, uint32_t rank, std::vector<uint32_t> expert_owner,
             ScalarType combine_type, bool per_expert, double timeout_s,
             const std::vector<const Arena*>& arenas, Proxy* proxy) {
            new (self) StandIn(
                device_options(layout, rank, std::move(expert_owner), combine_type, per_expert, timeout_s),
                bases_of(arenas), proxy);
          },
          nb::kw_only(), "layout"_a, "rank"_a, "expert_owner"_a, "combine_type"_a, "per_expert"_a,
          "timeout_s"_a, "arenas"_a, "proxy"_a.none(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>())
      .def("start_round", &StandIn::start_round, "channel"_a)
      .def(
          "wait_until_idle",
          [](StandIn& self, double most_s) { return self.wait_until_idle(seconds(most_s)); }, "most_s"_a,
          ReleaseLock())
      .def("stop", &StandIn::stop, ReleaseLock())
      .def("throw_if_failed", &StandIn::throw_if_failed);
}

void bind_device(nb::module_& m) {
  m.attr("NO_OWNER") = kNoOwner;
  m.def("duration_bounds", &duration_bounds,
        "Upper bounds of all buckets of a duration histogram but the last, in seconds.");
  nb::enum_<ScalarType>(m, "ScalarType")
      .value("bfloat16", ScalarType::kBfloat16)
      .value("float16", ScalarType::kFloat16)
      .value("float32", ScalarType::kFloat32);
  nb::enum_<Quantisation>(m, "Quantisation")
      .value("none", Quantisation::kNone)
      .value("fp8", Quantisation::kFp8)
      .value("fp8_power_of_2", Quantisation::kFp8PowerOf2)
      .value("fp8_ue8m0", Quantisation::kFp8Ue8m0);
  nb::class_<CpuDevice> device(m, "CpuDevice");
  device
      .def(
          "__init__",
          [](CpuDevice* self, const Layout& layout, uint32_t rank, std::vector<uint32_t> expert_owner,
             ScalarType combine_type, bool per_expert, double timeout_s,
             const std::vector<const Arena*>& arenas, Proxy* proxy, const CheckWait& check_wait,
             size_t trace_spans, Quantisation quantisation, size_t cached_bytes) {
            CpuDeviceOptions options =
                device_options(layout, rank, std::move(expert_owner), combine_type, per_expert, timeout_s);
            options.check_interrupt = interrupt_check(check_wait);
            options.trace_spans = trace_spans;
            options.quantisation = quantisation;
            options.cached_bytes = cached_bytes;
            new (self) CpuDevice(options, bases_of(arenas), proxy);
          },
          nb::kw_only(), "layout"_a, "rank"_a, "expert_owner"_a, "combine_type"_a, "per_expert"_a,
          "timeout_s"_a, "arenas"_a, "proxy"_a.none(), "check_wait"_a, "trace_spans"_a = 0, "quantisation"_a,
          "cached_bytes"_a = CpuDeviceOptions{}.cached_bytes, nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>())
      .def("trace", [](const CpuDevice& device) { return spans_of(device.trace()); })
      .def("dropped_spans", &CpuDevice::dropped_spans)
      .def(
          "dispatch_send",
          [](CpuDevice& device, uint32_t channel, uintptr_t x, size_t x_stride, uintptr_t scales,
             uintptr_t ids, bool ids_are_64_bit, uintptr_t weights, uint32_t tokens, uintptr_t token_count) {
            device.dispatch_send(channel, {.x = pointer<const std::byte>(x),
                                           .x_stride = x_stride,
                                           .scales = pointer<const std::byte>(scales),
                                           .ids = pointer<const void>(ids),
                                           .ids_are_64_bit = ids_are_64_bit,
                                           .weights = pointer<const float>(weights),
                                           .tokens = tokens,
                                           .token_count = pointer<const int32_t>(token_count)});
          },
          "channel"_a, "x"_a, "x_stride"_a, "scales"_a, "ids"_a, "ids_are_64_bit"_a, "weights"_a, "tokens"_a,
          "token_count"_a, ReleaseLock())
      .def(
          "dispatch_recv",
          [](CpuDevice& device, uint32_t channel, uint32_t room, uintptr_t x, uintptr_t scales, uintptr_t ids,
             uintptr_t weights, uintptr_t tokens_per_expert) {
            const uint32_t rows = device.dispatch_wait(channel);
            if (rows <= room) {
              device.dispatch_pack(channel, dispatch_output(x, scales, ids, weights, tokens_per_expert));
            }
            return rows;
          },
          "channel"_a, "room"_a, "x"_a, "scales"_a, "ids"_a, "weights"_a, "tokens_per_expert"_a,
          ReleaseLock(), "Returns the number of rows. More than `room` are left for dispatch_pack().")
      .def(
          "dispatch_pack",
          [](CpuDevice& device, uint32_t channel, uintptr_t x, uintptr_t scales, uintptr_t ids,
             uintptr_t weights, uintptr_t tokens_per_expert) {
            device.dispatch_pack(channel, dispatch_output(x, scales, ids, weights, tokens_per_expert));
          },
          "channel"_a, "x"_a, "scales"_a, "ids"_a, "weights"_a, "tokens_per_expert"_a, ReleaseLock())
      .def(
          "combine_send",
          [](CpuDevice& device, uint32_t channel, uintptr_t rows, bool per_slot, bool weights_applied) {
            device.combine_send(channel, {.rows = pointer<const std::byte>(rows),
                                          .per_slot = per_slot,
                                          .weights_applied = weights_applied});
          },
          "channel"_a, "rows"_a, "per_slot"_a, "weights_applied"_a, ReleaseLock())
      .def(
          "combine_recv",
          [](CpuDevice& device, uint32_t channel, uintptr_t out) {
            device.combine_recv(channel, pointer<std::byte>(out));
          },
          "channel"_a, "out"_a, ReleaseLock())
      .def("counters", [](const CpuDevice& device) { return counters_of(device); });
  bind_times(device);
}

}  // namespace

NB_MODULE(_core, m) {
  // A tensor that lives to the end of the process keeps its arena, rightly.
  nb::set_leak_warnings(false);
  m.doc() = "The compiled half of vllm_efa_ep; use vllm_efa_ep.AllToAll.";
  register_errors();
  bind_protocol(m);
  bind_memory(m);
  bind_fabric(m);
  bind_link(m);
  bind_signals(m);
  bind_proxy(m);
  bind_device(m);
  bind_cuda(m);
  bind_tensors(m);
  bind_stand_in(m);
}
